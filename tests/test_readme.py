"""The README keeps its word: its code runs, its support table is true, its tree is the tree."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vicinal
from vicinal import Full, Near, Same, Window, heads, union

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()


def table_rows() -> dict[str, list[str]]:
    block = TEXT.split("<!-- support:start -->")[1].split("<!-- support:end -->")[0]
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in block.strip().splitlines()]
    assert lines[0] == ["feature", "CPU", "NVIDIA GPU", "AMD GPU", "Apple GPU"]
    return {line[0]: line[1:] for line in lines[2:]}


def tensors(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def backward_of(*inputs: torch.Tensor, call: Callable[..., torch.Tensor]) -> None:
    grads = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def try_dtype(dtype: torch.dtype) -> None:
    query, key, value = (tensors(1, 6, 7, 2, 8, dtype=dtype, grad=True) for _ in range(3))
    backward_of(query, key, value, call=lambda *qkv: vicinal.na2d(*qkv, kernel_size=3))


def try_ranks() -> None:
    for grid in ((9,), (5, 6), (3, 4, 5)):
        query = tensors(1, *grid, 2, 8, grad=True)
        backward_of(query, call=lambda query: vicinal.attention(query, query, query, Near(3)))


def try_head_dims() -> None:
    query, value = tensors(1, 5, 6, 2, 13, grad=True), tensors(1, 5, 6, 2, 7, grad=True)
    backward_of(query, value, call=lambda query, value: vicinal.na2d(query, query, value, kernel_size=3))


def try_grouped_heads() -> None:
    query, key = tensors(1, 5, 6, 4, 8, grad=True), tensors(1, 5, 6, 2, 8, grad=True)
    backward_of(query, key, call=lambda query, key: vicinal.na2d(query, key, key, kernel_size=3))


def try_bias() -> None:
    query, bias = tensors(1, 5, 6, 2, 8, grad=True), tensors(2, 5, 5, grad=True)
    backward_of(query, bias, call=lambda query, bias: vicinal.na2d(query, query, query, 3, bias=bias))


def try_pattern(pattern: object) -> None:
    query = tensors(1, 5, 6, 2, 8, grad=True)
    backward_of(query, call=lambda query: vicinal.attention(query, query, query, pattern))


def try_extra() -> None:
    query, extra = tensors(1, 5, 6, 2, 8, grad=True), tensors(1, 3, 2, 8, grad=True)

    def call(query: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        out, extra_out = vicinal.attention(
            query, query, query, Near(3), extra_key=extra, extra_value=extra, extra_query=extra
        )
        return torch.cat([out.flatten(1, 2), extra_out], 1)

    backward_of(query, extra, call=call)


def try_grids() -> None:
    query, grids = tensors(2, 5, 6, 2, 8, grad=True), torch.tensor([[5, 4], [2, 6]])
    backward_of(query, call=lambda query: vicinal.attention(query, query, query, Near(3), grids=grids))


def try_two_grids() -> None:
    query, key = tensors(1, 10, 12, 2, 8, grad=True), tensors(1, 5, 6, 2, 8, grad=True)
    backward_of(query, key, call=lambda query, key: vicinal.attention(query, key, key, Near(3)))


def try_lse() -> None:
    query = tensors(1, 5, 6, 2, 8, grad=True)
    backward_of(query, call=lambda query: vicinal.na2d(query, query, query, 3, return_lse=True)[1])


def try_scores() -> None:
    query, value = tensors(1, 5, 6, 2, 8, grad=True), tensors(1, 5, 6, 2, 8, grad=True)

    def call(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return vicinal.apply_scores(vicinal.attention_scores(query, query, Near(3)).softmax(-1), value, Near(3))

    backward_of(query, value, call=call)


def try_second_derivatives() -> None:
    query = tensors(1, 5, 6, 1, 4, grad=True)
    (grad,) = torch.autograd.grad(vicinal.na2d(query, query, query, 3).sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), query)
    assert second.abs().sum() > 0


def try_compile() -> None:
    query = tensors(2, 5, 6, 2, 8)
    compiled = torch.compile(lambda query: vicinal.na2d(query, query, query, 3), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(query), vicinal.na2d(query, query, query, 3), atol=1e-6)


def try_export() -> None:
    module = vicinal.NeighborhoodAttention2D(16, 2, 3)
    inputs = tensors(2, 5, 6, 16)
    assert torch.allclose(torch.export.export(module, (inputs,)).module()(inputs), module(inputs), atol=1e-5)


def try_autocast() -> None:
    query = tensors(1, 5, 6, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert vicinal.na2d(query, query, query, 3).dtype == torch.bfloat16


TRIALS: dict[str, Callable[[], None]] = {
    "float32": lambda: try_dtype(torch.float32),
    "float64": lambda: try_dtype(torch.float64),
    "bfloat16": lambda: try_dtype(torch.bfloat16),
    "float16": lambda: try_dtype(torch.float16),
    "1, 2 and 3 axes": try_ranks,
    "any head dim, value dim of its own": try_head_dims,
    "grouped-query heads": try_grouped_heads,
    "relative position bias, with gradient": try_bias,
    "patterns per head": lambda: try_pattern(heads(Near(3), Window(3, shift=1))),
    "unions of patterns": lambda: try_pattern(union((Same(), Full()), (Full(), Same()))),
    "extra keys and extra queries": try_extra,
    "padded batches (`grids`)": try_grids,
    "query grid unlike key grid": try_two_grids,
    "log-sum-exp, with gradient": try_lse,
    "scores and weighted sums apart": try_scores,
    "second derivatives": try_second_derivatives,
    "torch.compile, fullgraph": try_compile,
    "torch.export": try_export,
    "autocast": try_autocast,
}


def test_support_table_has_a_trial_for_every_row() -> None:
    assert list(table_rows()) == list(TRIALS)


@pytest.mark.parametrize("feature", TRIALS, ids=str)
def test_support_table_says_yes_on_cpu_only_for_what_works(feature: str) -> None:
    assert table_rows()[feature][0] == "yes"
    TRIALS[feature]()


def test_support_table_claims_no_device_that_has_no_results() -> None:
    results = README.parent / "benchmarks" / "results"
    measured_on_gpu = any("cuda" in path.read_text() for path in results.glob("gpu*.json"))
    for feature, (_, *devices) in table_rows().items():
        assert measured_on_gpu or set(devices) <= {"not run", "not supported"}, feature


def test_readme_code_runs() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_readme_tree_is_the_tree() -> None:
    tree = re.search(r"```\nsrc/vicinal/\n(.*?)```", TEXT, re.DOTALL)
    assert tree is not None
    listed = set(re.findall(r"^  (\w+)/ ", tree.group(1), re.MULTILINE))
    package = README.parent / "src" / "vicinal"
    assert listed == {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    for folder in re.findall(r"^(\w+)/ ", tree.group(1), re.MULTILINE):
        assert (README.parent / folder).is_dir()
