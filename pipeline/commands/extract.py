"""The extract command as one tracked job: find what is there, read what is missing, merge, audit, log."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from matplotlib import pyplot as plt

from pipeline.commands import display
from pipeline.data.concepts import compute_split, counts
from pipeline.data.pools import read_pools, source_names
from pipeline.data.vectors import read_header
from pipeline.devices import bfloat16_hint
from pipeline.errors import InputError, WorkError, choices
from pipeline.extraction import audit_plots, vocabulary
from pipeline.extraction.audit import audit
from pipeline.extraction.check import Comparison, load_checked
from pipeline.extraction.parts import PartPlan, merge, read_parts
from pipeline.extraction.reader import automatic_batch_tokens
from pipeline.extraction.request import Request, check_output, check_prompts, make_request, read_output_header
from pipeline.extraction.vocabulary import Bar
from pipeline.processes import Worker, parse_shard, peak_memory_mb, start, worker_of
from pipeline.settings import ExtractOptions
from pipeline.storage import Output, file_name
from pipeline.teachers.find import Teacher, TeacherSource, find_teacher
from pipeline.teachers.load import load_teacher
from pipeline.tracking import Run, closing, connect, retry_tracking

CHECKS = ("auto", "on", "off")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """One process's share of an extraction; ``extracted`` is the header of a vectors file that answers it already."""

    options: ExtractOptions
    accelerator: Accelerator
    worker: Worker
    source: TeacherSource
    request: Request
    output: Output
    extracted: Mapping[str, str] | None


def run_extract(options: ExtractOptions) -> None:
    """Extract as the options say; every process of the job calls it, and the main process prints a summary."""
    accelerator = start()
    bar, tokens_bar = display.counting("extract", "concepts"), display.counting("vocabulary", "tokens")
    job = _find(options, accelerator)
    tracker = connect("extract") if accelerator.is_main_process else None
    plan = None
    if job.extracted is None:
        plan = _open_plan(job)
        job = replace(job, source=replace(job.source, dtype=plan.dtype), request=replace(job.request, dtype=plan.dtype))
    if tracker is None:
        if plan is not None:
            _read_missing(job, plan, lambda _concepts: nullcontext(lambda _done: None))
        return
    source, key = job.source, job.request.key
    tags = {"role": "extract", "teacher": source.name, "revision": source.revision, "extraction_key": key}
    with closing(retry_tracking(partial(tracker.open_run, f"extract {source.name}", tags))) as run:
        retry_tracking(lambda: run.log_params(asdict(options) | {"concepts": ",".join(options.concepts)}))
        if plan is not None:
            summary = _extract(run, job, plan, bar, tokens_bar)
        else:
            held = {"cache": "hit", "vectors_sha256": (job.extracted or {})["sha256"]}
            retry_tracking(lambda: run.set_tags(held))
            summary = f"{job.output}: holds these very vectors already (extraction key {key[:12]}); nothing to do"
        job.output.remove_local_copy()
    display.lines(summary)


def _find(options: ExtractOptions, accelerator: Accelerator) -> _Job:
    """Find the concepts, the teacher, and what is at the output."""
    shard = parse_shard(options.shard)
    check_prompts(options.template, options.pool)
    if options.check not in CHECKS:
        raise choices("check", options.check, CHECKS)
    names = source_names(options.concepts)
    catalogue, left_out = read_pools(names, options.judge, options.language)
    source = find_teacher(options.teacher, options.dtype, accelerator.device, options.trust_remote_code)
    output = Output.at(options.output or f"data/vectors/{file_name(source.name)}.safetensors")
    request = make_request(
        source, catalogue, layers=options.layers, templates=options.template, pool=options.pool,
        count=options.num_concepts, token_block=options.token_block,
    )  # fmt: skip
    header = read_output_header(output)
    if options.dtype == "auto" and shard.count > 1:
        request = request.in_merged_precision(header)
    inputs = [*names, *filter(None, [options.judge])]
    is_extracted = check_output(output, request, header, inputs, options.overwrite)
    if accelerator.is_main_process:
        for line in left_out:
            log.info(line)
        for line in compute_split(catalogue.judged).warnings:
            log.warning("warning: %s", line)
    worker = worker_of(shard, accelerator)
    return _Job(options, accelerator, worker, source, request, output, header if is_extracted else None)


def _open_plan(job: _Job) -> PartPlan:
    is_auto, device = job.options.dtype == "auto", job.accelerator.device
    tokens = job.options.batch_tokens or automatic_batch_tokens(job.source.config, device)
    plan = PartPlan.open(job.output, job.request, job.source.d_model, job.worker.count, tokens, is_auto)
    job.accelerator.wait_for_everyone()  # nobody opens the plan of a finished and merged extraction
    if plan.dtype != job.request.dtype:
        log.info("precision %s, as the first worker recorded it", plan.dtype)
    return plan


def _extract(run: Run, job: _Job, plan: PartPlan, bar: Bar, tokens_bar: Bar) -> str:
    """Read, merge and log on the main process; returns a summary."""
    options, output, worker = job.options, job.output, job.worker
    teacher, comparison, metrics = _read_missing(job, plan, bar)
    retry_tracking(lambda: run.log_metrics(metrics))
    if not options.merge:
        plan.wait_for([Worker(worker.index + n, worker.count) for n in range(job.accelerator.num_processes)])
        if (missing := len(plan.missing())) and not plan.is_merged:
            others = f"the last shard merges, {missing} parts are left to others"
            return f"{output}: shard {options.shard} is done; {others}"
    in_sink = merge(job.request, plan)
    summary = retry_tracking(lambda: _log(run, job, in_sink, comparison))
    if options.vocabulary and output.path.suffix != ".pt":
        teacher = teacher or load_teacher(job.source, job.accelerator.device, options.device_map)
        place = vocabulary.write_beside(output, teacher, job.request, tokens_bar)
        summary += f"\n{place}: the teacher's vocabulary, with which students answer for any text"
    return summary


def _read_missing(job: _Job, plan: PartPlan, bar: Bar) -> tuple[Teacher | None, Comparison | None, dict[str, float]]:
    """Read this process's missing parts; returns teacher and comparison where they were needed, and metrics."""
    options, source, device = job.options, job.source, job.accelerator.device
    missing = [] if options.merge else plan.missing(job.worker)
    if done := len(plan.parts) - len(plan.missing()):
        log.info("%d of %d parts were extracted before", done, len(plan.parts))
    if not missing:
        return None, None, {}
    advice = bfloat16_hint("--dtype bfloat16", plan.dtype, device) if options.dtype == "auto" else None
    if advice and job.accelerator.is_main_process:
        log.info(advice)
    comparison = None
    try:
        is_checked = options.check == "on" or (options.check == "auto" and not source.is_tested)
        if is_checked and job.accelerator.is_main_process:
            teacher, comparison = load_checked(source, job.request, device, options.device_map)
        else:
            teacher = load_teacher(source, device, options.device_map)
    except (InputError, WorkError):
        if job.worker.count == 1 and not done:  # else others may be reading
            plan.clear()
        raise
    with bar(sum(part.stop - part.start for part in missing)) as advance:
        metrics = read_parts(teacher, job.request, plan, missing, options.batch_tokens, advance)
    metrics |= {"peak_memory_mb": peak_memory_mb(device)} | (comparison.metrics() if comparison else {})
    return teacher, comparison, metrics


def _log(run: Run, job: _Job, in_sink: list[str], comparison: Comparison | None) -> str:
    """Audit the finished file and log it; returns a summary."""
    request, output = job.request, job.output
    sides = ", ".join(f"{number} {side}" for side, number in counts(request.splits).items())
    summary = f"{output}: {len(request.concepts)} concepts ({sides}), blocks {list(request.layers)}"
    if not {"val", "test"} <= set(request.splits):
        log.warning("warning: %s; students need some of each side (of 10 concepts at the least)", sides)
    run.log_artifact(output.path)
    run.log_metrics({"concepts": len(request.concepts)})
    if output.path.suffix == ".pt":
        return summary
    header = read_header(output.path)
    found = audit(output.path, request, in_sink)
    for line in found.warnings():
        log.warning("warning: %s", line)
    manifest = {name: value for name, value in header.items() if name not in ("concepts", "categories", "splits")}
    manifest |= {"number_of_concepts": len(request.concepts)} | found.manifest()
    run.log_json("manifest.json", manifest | ({"check": comparison.manifest()} if comparison else {}))
    run.log_metrics(found.metrics())
    figures = {"norms": audit_plots.norms(found.norms, found.layers)}
    if len(found.categories) > 1:
        figures["structure"] = audit_plots.structure(found.structure, found.layers, found.categories)
    with tempfile.TemporaryDirectory() as folder:
        for name, figure in figures.items():
            path = Path(folder) / f"{name}.png"
            figure.savefig(path, dpi=130)
            plt.close(figure)
            run.log_artifact(path)
    concepts = ",".join(job.options.concepts)
    run.log_dataset(f"vectors {request.teacher}", header["sha256"], str(output), concepts, "extraction")
    run.set_tags({"vectors_sha256": header["sha256"]})
    if found.agreement:
        summary += f", agreement of templates {min(found.agreement):.3f} to {max(found.agreement):.3f}"
    return f"{summary}, sha256 of the tensors {header['sha256']}"
