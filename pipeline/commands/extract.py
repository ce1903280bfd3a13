"""The extract command as one tracked job: find what is there, read what is missing, merge, audit, log."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator
from matplotlib import pyplot as plt

from pipeline.data.concepts import counts, divide, read_catalogue
from pipeline.data.vectors import read_header
from pipeline.devices import hint
from pipeline.errors import InputError, choices
from pipeline.extraction import audit_plots, vocabulary
from pipeline.extraction.audit import Audit, audit
from pipeline.extraction.check import Comparison, compare, reference
from pipeline.extraction.parts import PartPlan, merge
from pipeline.extraction.reader import Cost, automatic_batch_tokens, read_parts
from pipeline.extraction.request import (
    Request,
    as_merged,
    check_output,
    check_prompts,
    header_of,
    is_extracted,
    make_request,
)
from pipeline.extraction.vocabulary import Bar
from pipeline.processes import Worker, parse_shard, peak_memory_mb, worker_of
from pipeline.settings import ExtractOptions
from pipeline.storage import Output, file_name, put
from pipeline.teachers.find import Source, Teacher, find_teacher
from pipeline.teachers.load import load_teacher, load_untouched, prepared
from pipeline.teachers.residuals import flops_per_token
from pipeline.tracking import Run, closing, connect, retry_tracking

CHECKS = ("auto", "on", "off")

log = logging.getLogger(__name__)


def run_extract(options: ExtractOptions, accelerator: Accelerator, bar: Bar, tokens_bar: Bar) -> str | None:
    """Extract as the options say; every process of the job calls it.

    Args:
        options: what the user asked for.
        accelerator: this process among the others.
        bar: given a number of concepts, a progress bar that is advanced by concepts.
        tokens_bar: the same for the tokens of the vocabulary.

    Returns:
        What to tell the user, from the main process.

    Raises:
        InputError: the options, the teacher or the catalogue are wrong.
        WorkError: out of memory, or a merge without all parts.
    """
    shard = parse_shard(options.shard)
    _check(options)
    catalogue = read_catalogue(options.concepts, options.language)
    source = find_teacher(options.teacher, options.dtype, accelerator.device, options.trust_remote_code)
    output = Output.at(options.output or f"data/vectors/{file_name(source.name)}.safetensors")
    request = make_request(
        source, catalogue, layers=options.layers, templates=options.template, pool=options.pool,
        count=options.num_concepts, token_block=options.token_block,
    )  # fmt: skip
    if output.path.suffix == ".pt" and (len(request.layers), len(request.templates)) != (1, 1):
        raise InputError(f"--output {output}: a .pt file holds one layer and one template; write .safetensors")
    if options.dtype == "auto" and shard.count > 1:
        request = as_merged(output, request)
    held = is_extracted(output, request)
    check_output(output, request, options.concepts, options.overwrite)
    if not accelerator.is_main_process:
        if not held:
            _share(options, accelerator, source, request, output, shard, _no_bar)
        return None
    for line in divide(catalogue).warnings:
        log.warning("warning: %s", line)
    tags = {"role": "extract", "teacher": source.name, "revision": source.revision, "extraction_key": request.key}
    tracker = connect("extract")
    with closing(retry_tracking(lambda: tracker.open_run(f"extract {source.name}", tags))) as run:
        retry_tracking(lambda: run.log_params(asdict(options)))
        if held:
            output.leave()
            known = {"cache": "hit", "vectors_sha256": (header_of(output) or {})["sha256"]}
            retry_tracking(lambda: run.set_tags(known))
            return f"{output}: holds these very vectors already (extraction key {request.key[:12]}); nothing to do"
        plan, teacher, compared = _share(options, accelerator, source, request, output, shard, bar, run)
        if plan.dtype != request.dtype:
            source, request = replace(source, dtype=plan.dtype), replace(request, dtype=plan.dtype)
            key = {"extraction_key": request.key}
            retry_tracking(lambda: run.set_tags(key))
        if not options.merge and (missing := len(plan.missing())) and not plan.is_merged:
            output.leave()
            return f"{output}: shard {options.shard} is done; the last shard merges, {missing} parts are left to others"
        in_sink = merge(request, plan)
        told = retry_tracking(lambda: _log(run, request, output, options, in_sink, compared))
        if options.vocabulary and output.path.suffix != ".pt":
            teacher = teacher or load_teacher(source, accelerator.device, options.device_map)
            place = _write_vocabulary(teacher, request, output, tokens_bar)
            told += f"\n{place}: the teacher's vocabulary, with which students answer for any text"
        output.leave()
        return told


def _check(options: ExtractOptions) -> None:
    check_prompts(options.template, options.pool)
    if options.check not in CHECKS:
        raise choices("check", options.check, CHECKS)


@contextmanager
def _no_bar(_concepts: int) -> Iterator[Callable[[float], None]]:
    yield lambda concepts: None


def _share(
    options: ExtractOptions,
    accelerator: Accelerator,
    source: Source,
    request: Request,
    output: Output,
    shard: Worker,
    bar: Bar,
    run: Run | None = None,
) -> tuple[PartPlan, Teacher | None, Comparison | None]:
    """Read this process's share of the parts; the main process waits for the others on its machine.

    Returns:
        The plan; the teacher where there was something to read; and how it compares with the untouched model, where
        that was asked for.
    """
    teacher = compared = None
    me = worker_of(shard, accelerator)
    tokens = options.batch_tokens or automatic_batch_tokens(source.config, accelerator.device)
    d_model = source.d_model
    plan = PartPlan.open(output, request, d_model, me.count, tokens, dtype_is_open=options.dtype == "auto")
    if plan.dtype != request.dtype:
        log.info("precision %s, as the first worker recorded it", plan.dtype)
        source, request = replace(source, dtype=plan.dtype), replace(request, dtype=plan.dtype)
    accelerator.wait_for_everyone()  # nobody opens the plan of a finished and merged extraction
    todo = [] if options.merge else plan.missing(me)
    if done := len(plan.parts) - len(plan.missing()):
        log.info("%d of %d parts were extracted before", done, len(plan.parts))
    if todo:
        advice = hint("--dtype bfloat16", plan.dtype, accelerator.device) if options.dtype == "auto" else None
        if advice and accelerator.is_main_process:
            log.info(advice)
        with plan.removed_on_failure() if me.count == 1 and not done else nullcontext():  # else others may be at it
            teacher, compared = _loaded(source, request, options, accelerator)
        if run is not None and compared is not None:
            figures = compared.metrics()
            retry_tracking(lambda: run.log_metrics(figures))
        templates = len(request.templates)
        with bar(sum(part.stop - part.start for part in todo)) as advance:
            cost = read_parts(
                teacher, request, plan, todo, options.batch_tokens, lambda prompts: advance(prompts / templates)
            )
        if run is not None:
            speed = _speed(cost, templates, flops_per_token(teacher, request.layers), accelerator)
            retry_tracking(lambda: run.log_metrics(speed))
    if run is not None and not options.merge:
        here = [Worker(shard.index * accelerator.num_processes + n, me.count) for n in range(accelerator.num_processes)]
        while any(plan.missing(worker) for worker in here) and not plan.is_merged:
            time.sleep(0.2)
    return plan, teacher, compared


def _loaded(
    source: Source, request: Request, options: ExtractOptions, accelerator: Accelerator
) -> tuple[Teacher, Comparison | None]:
    """The teacher, and how it compares with the untouched model.

    Raises:
        WorkError: its vectors are not those of the untouched model.
    """
    untouched = load_untouched(source, accelerator.device, options.device_map)
    is_asked = options.check == "on" or (options.check == "auto" and not source.is_tested)
    if not is_asked or not accelerator.is_main_process:
        return prepared(untouched), None
    log.info("checking a few prompts against the model's own pass")
    expected = reference(untouched, request)
    teacher = prepared(untouched)
    return teacher, compare(teacher, request, expected)


def _write_vocabulary(teacher: Teacher, request: Request, output: Output, bar: Bar) -> str:
    """Leave the vocabulary beside the vectors file; where it is."""
    place, path = vocabulary.beside(str(output)), Path(vocabulary.beside(str(output.path)))
    vocabulary.write(vocabulary.read_from(teacher, request, bar), path)
    if output.url is not None:
        put(path, place)
    return place


def _speed(cost: Cost, templates: int, token_flops: float, accelerator: Accelerator) -> dict[str, float]:
    """Speed of this process."""
    return {
        "seconds": cost.seconds,
        "tokens": cost.tokens,
        "concepts_per_second": cost.prompts / templates / cost.seconds,
        "tokens_per_second": cost.tokens / cost.seconds,
        "flops_per_second": cost.tokens * token_flops / cost.seconds,
        "peak_memory_mb": peak_memory_mb(accelerator.device),
    }


def _log(
    run: Run,
    request: Request,
    output: Output,
    options: ExtractOptions,
    in_sink: list[str],
    compared: Comparison | None,
) -> str:
    """Audit the finished file, log it, and say what it is."""
    sides = ", ".join(f"{number} {side}" for side, number in counts(request.splits).items())
    told = f"{output}: {len(request.concepts)} concepts ({sides}), blocks {list(request.layers)}"
    if not {"val", "test"} <= set(request.splits):
        log.warning("warning: %s; students need some of each side (of 10 concepts at the least)", sides)
    run.log_artifact(output.path)
    run.log_metrics({"concepts": len(request.concepts)})
    if output.path.suffix == ".pt":
        return told
    header = read_header(output.path)
    found = audit(output.path, request, in_sink)
    for line in found.warnings():
        log.warning("warning: %s", line)
    manifest = {name: value for name, value in header.items() if name not in ("concepts", "categories", "splits")}
    manifest |= {"number_of_concepts": len(request.concepts)} | found.manifest()
    run.log_json("manifest.json", manifest | ({"check": compared.manifest()} if compared else {}))
    run.log_metrics(found.metrics())
    _log_pictures(run, found)
    run.log_dataset(f"vectors {request.teacher}", header["sha256"], str(output), options.concepts, "extraction")
    run.set_tags({"vectors_sha256": header["sha256"]})
    if found.agreement:
        told += f", agreement of templates {min(found.agreement):.3f} to {max(found.agreement):.3f}"
    return f"{told}, sha256 of the tensors {header['sha256']}"


def _log_pictures(run: Run, found: Audit) -> None:
    figures = {"norms": audit_plots.norms(found.norms, found.layers)}
    if len(found.categories) > 1:
        figures["structure"] = audit_plots.structure(found.structure, found.layers, found.categories)
    with tempfile.TemporaryDirectory() as folder:
        for name, figure in figures.items():
            path = Path(folder) / f"{name}.png"
            figure.savefig(path, dpi=130)
            plt.close(figure)
            run.log_artifact(path)
