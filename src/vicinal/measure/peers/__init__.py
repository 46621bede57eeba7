"""What a user would otherwise write or install: each peer is made once per task, and only its call is timed."""

from __future__ import annotations

from collections.abc import Callable

from vicinal.measure.peers.dense import flex, gather, sdpa_mask
from vicinal.measure.peers.halo import halo_bmm, halo_sdpa
from vicinal.measure.peers.installed import natten, timm_window, transformers_window
from vicinal.measure.peers.window import window_sdpa
from vicinal.measure.task import Prepared, Task

PEERS: dict[str, Callable[[Task], list[Prepared]]] = {
    "halo_bmm": halo_bmm,
    "halo_sdpa": halo_sdpa,
    "gather": gather,
    "sdpa_mask": sdpa_mask,
    "flex": flex,
    "window_sdpa": window_sdpa,
    "timm": timm_window,
    "transformers": transformers_window,
    "natten": natten,
}
"""A peer's name -> what makes its candidates for a task (of several the fastest is reported); may raise `NotRun`."""

__all__ = ["PEERS"]
