"""pytest-benchmark cases of hard instances: construction and decision."""

import pytest

from benches.hardness import CONSTRUCTIONS, SIZES, draw, exact
from lowerbounds import decide, reduce_to_attention


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("problem", list(CONSTRUCTIONS))
@pytest.mark.benchmark(group="reductions")
def bench_reduction(benchmark, problem, order):
    instances = [draw(problem, order, SIZES[order], seed) for seed in range(4)]

    def call():
        return [decide(reduce_to_attention(x), exact(order)) for x in instances]

    wrong = sum(
        answer is not x.has_solution
        for answer, x in zip(call(), instances, strict=True)
    )
    assert wrong == 0
    benchmark.extra_info.update(n=SIZES[order], order=order, error=wrong)
    benchmark(call)
