"""The names that NATTEN gives to its arguments' types."""

from __future__ import annotations

import enum
from typing import TypeAlias

NoneType = type(None)

Dimension1DType: TypeAlias = tuple[int]
Dimension2DType: TypeAlias = tuple[int, int]
Dimension3DType: TypeAlias = tuple[int, int, int]
DimensionType: TypeAlias = Dimension1DType | Dimension2DType | Dimension3DType

CausalArg1DType: TypeAlias = tuple[bool]
CausalArg2DType: TypeAlias = tuple[bool, bool]
CausalArg3DType: TypeAlias = tuple[bool, bool, bool]
CausalArgType: TypeAlias = CausalArg1DType | CausalArg2DType | CausalArg3DType

Dimension1DTypeOrDed: TypeAlias = int | Dimension1DType
Dimension2DTypeOrDed: TypeAlias = int | Dimension2DType
Dimension3DTypeOrDed: TypeAlias = int | Dimension3DType
DimensionTypeOrDed: TypeAlias = int | DimensionType

CausalArg1DTypeOrDed: TypeAlias = bool | CausalArg1DType
CausalArg2DTypeOrDed: TypeAlias = bool | CausalArg2DType
CausalArg3DTypeOrDed: TypeAlias = bool | CausalArg3DType
CausalArgTypeOrDed: TypeAlias = bool | CausalArgType


class KernelSchedule(enum.Enum):
    """Which of NATTEN's Hopper kernels to run; accepted and ignored."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2
