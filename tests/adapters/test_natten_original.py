"""Our functions against the real NATTEN, as far as it runs on a CPU: its FlexAttention path, forward only.

It computes in a process of its own, so that neither it nor its name is loaded here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vicinal.adapters import natten

from .natten_problems import PROBLEMS, NattenProblem

FOLDER = Path(os.environ.get("VICINAL_TEST_NATTEN", Path(sys.prefix, "natten")))
"""Where `make test` puts it: beside the environment's packages, not among them."""

pytestmark = pytest.mark.skipif(
    not (FOLDER / "natten").is_dir(),
    reason=f"NATTEN {natten.__version__} is not in {FOLDER}; `make test` puts it there where PyPI can be reached",
)

ORIGINAL = """
import sys, warnings
import torch
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import natten
assert natten.__file__.startswith(sys.argv[1]), natten.__file__

def answer(name, args, options):
    if name.startswith("Neighborhood"):
        state, inputs = args
        module = getattr(natten, name)(**options)
        module.load_state_dict(state)
        return module(inputs)
    return getattr(natten, name)(*args, **options)

with torch.inference_mode():
    answers = [answer(*question) for question in torch.load(sys.argv[2])]
torch.save([natten.__version__, answers], sys.argv[2])
"""

Question = tuple[str, tuple[Any, ...], dict[str, Any]]


def runs_there(problem: NattenProblem) -> bool:
    """Whether NATTEN can: on a CPU no value dim of its own, and nothing causal where the window is the axis."""
    whole = len(problem.grid) == 1 and problem.kernel_size == problem.grid
    return problem.value_dim is None and not (whole and any(problem.window["is_causal"]))


def questions() -> dict[str, Question]:
    found: dict[str, Question] = {}
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for problem in filter(runs_there, PROBLEMS):
        kv_shape = (1, *problem.grid, problem.kv_heads, problem.head_dim)
        args = (drawn(1, *problem.grid, problem.heads, problem.head_dim), drawn(*kv_shape), drawn(*kv_shape))
        name = f"na{len(problem.grid)}d"
        found[f"{problem}"] = (name, args, {**problem.window, "scale": 0.3, "return_lse": True})
    args = (drawn(2, 9, 11, 4, 8), drawn(2, 9, 11, 2, 8), drawn(2, 9, 11, 2, 8))
    extra = {"additional_keys": drawn(2, 5, 2, 8), "additional_values": drawn(2, 5, 2, 8)}
    found["additional"] = ("na2d", args, {"kernel_size": 4, "dilation": (2, 1), **extra, "return_lse": True})
    whole = {"kernel_size": (9, 11), **extra, "return_lse": True}
    found["additional-whole"] = ("na2d", args, whole)
    found["attention"] = (
        "attention",
        (drawn(2, 9, 4, 8), drawn(2, 14, 2, 8), drawn(2, 14, 2, 8)),
        {"return_lse": True},
    )
    outs, lses = [drawn(2, 9, 4, 8) for _ in range(3)], [drawn(2, 9, 4) for _ in range(3)]
    found["merge"] = ("merge_attentions", (outs, lses), {"torch_compile": False})
    for rank in (1, 2, 3):
        name = f"NeighborhoodAttention{rank}D"
        options = {"embed_dim": 16, "num_heads": 2, "kernel_size": 3, "stride": 2, "dilation": 2, "qkv_bias": False}
        state = {"qkv.weight": drawn(48, 16), "proj.weight": drawn(16, 16), "proj.bias": drawn(16)}
        found[name] = (name, (state, drawn(1, *(7, 6, 9)[:rank], 16)), options)
    return found


QUESTIONS = questions()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What NATTEN answers to all questions."""
    file = tmp_path_factory.mktemp("original") / "questions.pt"
    torch.save(list(QUESTIONS.values()), file)
    ran = subprocess.run(
        [sys.executable, "-c", ORIGINAL, str(FOLDER), str(file)],
        # its merging compiles itself, which takes a minute and a compiler; as it is written is all we ask for
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "NATTEN_LOG_LEVEL": "CRITICAL"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    version, answers = torch.load(file)
    assert version == natten.__version__
    return dict(zip(QUESTIONS, answers, strict=True))


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_real_natten_says_the_same(original: dict[str, Any], name: str) -> None:
    function, args, options = QUESTIONS[name]
    if function.startswith("Neighborhood"):
        state, inputs = args
        module = getattr(natten, function)(**options)
        module.load_state_dict(state)
        found = module(inputs)
    else:
        found = getattr(natten, function)(*args, **options)
    wanted = original[name]
    for ours, theirs in zip(*((it if isinstance(it, tuple) else (it,)) for it in (found, wanted)), strict=True):
        assert theirs.abs().max() > 0.1
        # two float32 computations of sums of at most a few hundred terms, which may cancel
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, float(theirs.abs().max())))
