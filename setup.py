"""Builds the CPU kernels in csrc/ into a plain shared library inside the package, `vicinal/_cpu.so`.

The library has a C interface and knows neither Python nor torch, so one wheel serves every version of both. Where
there is no compiler, or it fails, the package installs without the library and says so; with
VICINAL_REQUIRE_LIBRARY=1 in the environment that is an error instead, as a wheel for others needs it.
"""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

IS_FOR_DEBUGGING = "-g" in os.environ.get("CXXFLAGS", "").split()
# More than -O1 takes sanitizers minutes, and says less about where something went wrong. Python's own flags ask for
# debugging information, which would be most of the library.
OPTIMIZATION = ["-O1"] if IS_FOR_DEBUGGING else ["-O3", "-g0"]
# Infinities and NaN keep their meaning: -inf is a log-sum-exp, NaN must come through.
COMMON = ["-std=c++17", *OPTIMIZATION, "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
COMMON_MSVC = ["/std:c++17", "/O2", "/EHsc", "/fp:precise"]

# Sanitizers do not see what matrix registers load, so loops stand for them there.
EMULATION = [("VICINAL_EMULATE_AMX", "1")] if IS_FOR_DEBUGGING else []

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2]
# By the end of a file's name, longest first: what it needs, for gcc and clang and for MSVC, and the macro that tells
# all files that the compiler has it. Where it has not, such a file compiles to nothing.
INSTRUCTION_SETS = {
    "_amx": (
        [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
        ["/arch:AVX512"],
        "VICINAL_WITH_AMX",
    ),
    "_avx512_bf16": ([*AVX512, "-mavx512bf16"], ["/arch:AVX512"], "VICINAL_WITH_AVX512_BF16"),
    "_avx512": (AVX512, ["/arch:AVX512"], "VICINAL_WITH_AVX512"),
    "_avx2": (AVX2, ["/arch:AVX2"], "VICINAL_WITH_AVX2"),
}
UNKNOWN_TO_MSVC = ("_avx512_bf16", "_amx")

EMPTY = "int main() { return 0; }\n"
# By the end of a file's name: what a compiler must build that has such files written in assembler. Flags alone do not
# say whether the assembler behind the compiler knows the instructions.
PROBES = {
    "_amx": """
int main() {
    char numbers[64] = {};
    __asm__ volatile("ldtilecfg %0" ::"m"(numbers));
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(numbers), "r"(0L));
    __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
    return 0;
}
"""
}


class BuildLibrary(build_ext):
    """Compiles each file with its own flags, two at a time, and only what has changed."""

    def finalize_options(self) -> None:
        if self.build_temp is None:  # a folder that is kept, also by pip, which would take a new one each time
            self.build_temp = str(Path("build", f"cpu-{sysconfig.get_platform()}"))
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + SUFFIX

    def get_export_symbols(self, ext: Extension) -> list[str]:
        del ext
        return []  # not a Python module: the C functions are marked in their header

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except (CCompilerError, ExecError, PlatformError, OSError) as problem:
            if os.environ.get("VICINAL_REQUIRE_LIBRARY") == "1":
                raise
            print(f"vicinal: installing without the CPU kernels, which could not be compiled: {problem}")
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        if all(Path(self.build_lib, self.get_ext_filename(ext.name)).exists() for ext in self.extensions):
            super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def _build(self, ext: Extension) -> None:
        is_msvc = self.compiler.compiler_type == "msvc"
        common = COMMON_MSVC if is_msvc else COMMON
        compile_openmp, link_openmp = self._openmp(is_msvc)
        is_x86 = self.plat_name.endswith(("x86_64", "amd64", "AMD64"))
        sets = {
            ending: (msvc if is_msvc else flags, macro)
            for ending, (flags, msvc, macro) in INSTRUCTION_SETS.items()
            if is_x86 and (ending not in UNKNOWN_TO_MSVC if is_msvc else self._takes(flags, PROBES.get(ending, EMPTY)))
        }
        macros = [*((macro, "1") for _, macro in sets.values()), *EMULATION]

        def compile_one(source: str) -> str:
            ending = next((ending for ending in INSTRUCTION_SETS if Path(source).stem.endswith(ending)), "")
            flags = sets[ending][0] if ending in sets else []
            arguments = [*common, *compile_openmp, *flags]
            (target,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
            if self._is_fresh(target, source, [*arguments, *map(str, macros)]):
                return target
            self.compiler.compile([source], self.build_temp, macros, ["csrc"], extra_postargs=arguments)
            return target

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            # the largest first, so that no long one is left to the end
            order = sorted(ext.sources, key=lambda source: -Path(source).stat().st_size)
            objects = list(pool.map(compile_one, order))
        output = self.get_ext_fullpath(ext.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        options = ["-s"] if sys.platform == "linux" and not IS_FOR_DEBUGGING else []
        self.compiler.link_shared_object(
            sorted(objects), output, extra_postargs=[*options, *link_openmp], target_lang="c++"
        )

    def _is_fresh(self, target: str, source: str, arguments: list[str]) -> bool:
        """Whether the object is newer than all it was made of, and made with these arguments; notes the arguments."""
        noted, text = (
            Path(f"{target}.arguments"),
            " ".join([str(self.compiler.__dict__.get("compiler_so")), *arguments]),
        )
        made = Path(target)
        parts = [source, "setup.py", *HEADERS]
        is_fresh = (
            made.exists()
            and noted.exists()
            and noted.read_text() == text
            and all(Path(part).stat().st_mtime < made.stat().st_mtime for part in parts)
        )
        if not is_fresh:
            made.unlink(missing_ok=True)
            noted.parent.mkdir(parents=True, exist_ok=True)
            noted.write_text(text)
        return is_fresh

    def _openmp(self, is_msvc: bool) -> tuple[list[str], list[str]]:
        """What compiles and links OpenMP here; nothing where the compiler has none, as Apple's."""
        if is_msvc:
            return ["/openmp"], []
        program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
        return (["-fopenmp"], ["-fopenmp"]) if self._takes(["-fopenmp"], program) else ([], [])

    def _takes(self, flags: list[str], program: str = EMPTY) -> bool:
        """Whether the compiler builds a program with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(program)
            command = [*self.compiler.compiler_so_cxx, *flags, str(source), "-o", str(Path(folder, "probe"))]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("vicinal._cpu", SOURCES, depends=HEADERS, language="c++")],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
