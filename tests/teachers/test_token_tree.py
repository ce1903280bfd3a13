"""A token tree holds every distinct beginning once, and every prompt in full."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.teachers.token_tree import common_prefix, grow

PROMPTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=30)


@given(PROMPTS, st.lists(st.integers(0, 3), max_size=3), st.integers(1, 40), st.integers(1, 8))
def test_every_prompt_is_a_path_and_no_beginning_stands_twice(endings, beginning, budget, long):
    prompts = [beginning + ending for ending in endings]
    prefix = common_prefix(prompts, min(map(len, prompts)) - 1)
    assert prefix >= min(len(beginning), min(map(len, prompts)) - 1)
    seen = []
    for tree in grow(prompts, prefix, budget, long):
        beginnings = set()
        for prompt, path in zip(tree.prompts, tree.paths, strict=True):
            nodes = path[path >= 0]
            assert tree.token_ids[nodes].tolist() == prompts[prompt][prefix:]
            assert tree.depths[nodes].tolist() == list(range(prefix, len(prompts[prompt])))
            beginnings |= {tuple(prompts[prompt][prefix:end]) for end in range(prefix + 1, len(prompts[prompt]) + 1)}
            seen.append(int(prompt))
        assert len({len(prompts[prompt]) - prefix > long for prompt in tree.prompts}) == 1
        assert len(tree.token_ids) == len(beginnings)
        assert len(tree.token_ids) <= budget or len({tuple(prompts[prompt]) for prompt in tree.prompts}) == 1
        for start, ways in tree.levels:
            for number, way in enumerate(ways, start):
                assert way[-1] == number
                assert tree.depths[way].tolist() == list(range(prefix, prefix + len(way)))
                assert any(way.tolist() == path[: len(way)].tolist() for path in tree.paths)
    assert sorted(seen) == list(range(len(prompts)))


@given(PROMPTS, st.integers(0, 6))
def test_the_common_prefix_is_the_longest(prompts, longest):
    length = common_prefix(prompts, longest)
    assert len({tuple(prompt[:length]) for prompt in prompts}) == 1
    limit = min(longest, *map(len, prompts))
    assert length == limit or len({tuple(prompt[: length + 1]) for prompt in prompts}) > 1
