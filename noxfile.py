# SPDX-License-Identifier: Apache-2.0
"""Everything CI runs, by name. `nox -s tests` is the whole set; `nox -l` lists the parts.

The stock and the patched engines lie in a folder each and are chosen by PYTHONPATH, so that torch
and the other dependencies are installed once. They are those of the first engine; what a further
one needs in other versions lies in a folder too.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests"]

# Hundreds of processes import the same: what one of them has compiled must serve the others.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

REPO = Path(__file__).resolve().parent
BUILD = ["cmake>=3.22", "ninja", "nanobind>=2.4", "scikit-build-core>=0.11"]
# Exact, since each release of these finds other things.
LINT = ["ruff==0.17.5", "mypy==2.4.1", "clang-format==23.1.5"]
# What the core's modules import, for mypy.
CORE = ["pydantic>=2", "nvidia-ml-py", "typer", "rich", "prometheus-client"]
CORE += [
    "starlette>=0.40",
    "uvicorn>=0.30",
    "aiohttp>=3.10",
    "httpx>=0.27",
    "anyio>=4.4",
    "pyyaml>=6",
]
CORE += ["opentelemetry-sdk>=1.26", "opentelemetry-exporter-otlp-proto-http>=1.26"]
TEST = ["pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "numpy"]
TEST += ["tomli; python_version < '3.11'"]
# What the router's tests ask it with.
TEST += ["openai", "schemathesis>=4", "playwright"]
SANITIZERS = ("address,undefined", "thread")
JOBS = str(min(os.cpu_count() or 1, 8))
# Test processes at once: an engine that starts or answers keeps one core busy, and a little more.
TWO = ("-n", str(min(os.cpu_count() or 1, 2)))


@dataclass(frozen=True)
class Fork:
    """A pinned engine, and what the sessions must know of it."""

    pin: str
    variables: str
    """How the variables begin that tell the tests its folders."""
    probe: str
    """Imports it as `engine`, and fails on another device than {variant}."""
    cpu: Mapping[str, str] = field(default_factory=dict)
    """What it needs in the environment to run on a CPU."""


VLLM = Fork(
    "vllm-0.24.0",
    "ENGINE",
    "import vllm as engine; from vllm.platforms import current_platform as p;"
    "assert p.is_{variant}(), p",
)
SGLANG = Fork(
    "sglang-0.5.15.post1",
    "SGLANG",
    "import sglang as engine; from sglang.srt import utils; assert utils.is_{variant}()",
    {"SGLANG_USE_CPU_ENGINE": "1"},
)


@dataclass(frozen=True)
class Engines:
    """The stock and the patched engine of one fork, each in a folder of its own."""

    fork: Fork
    archive: Path
    stock: Path
    patched: Path
    deps: Path | None
    """What they need that the environment lacks, or has in another version."""

    def folders(self) -> dict[str, str]:
        found = {"STOCK": self.stock, "PATCHED": self.patched, "DEPS": self.deps}
        return {f"{self.fork.variables}_{name}": str(path) for name, path in found.items() if path}

    def environment(self, engine: Path) -> dict[str, str]:
        path = [str(folder) for folder in (engine, self.deps) if folder]
        return {"PYTHONPATH": os.pathsep.join(path), **self.folders()}


@nox.session
def tests(session: nox.Session) -> None:
    """All of CI in one environment; arguments go to the end-to-end tests."""
    _system_packages(session)
    _install(session, *LINT, *CORE, *BUILD, *TEST)
    with ThreadPoolExecutor(1) as background:
        # It compiles, which no package changes that is fetched and unpacked meanwhile.
        cpp = background.submit(_cpp, session, silent=True)
        _lint(session)
        _check_patches(session)
        _core(session)
        vllm = _engines(session, VLLM)
        sglang = _engines(session, SGLANG)
        cpp.result()
    _unit(session)
    _engine_tests(session, vllm, ("off", "on"))
    _e2e(session, vllm, sglang, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Format, style and types."""
    _install(session, *LINT, *CORE, "pytest>=8")
    _lint(session)


@nox.session
def cpp(session: nox.Session) -> None:
    """The C++ tests under each set of sanitizers."""
    _system_packages(session)
    _install(session, *BUILD)
    _cpp(session)


@nox.session
def unit(session: nox.Session) -> None:
    """The Python tests that need no engine; arguments go to pytest."""
    _system_packages(session)
    _core(session)
    _unit(session, *session.posargs)


@nox.session
def engine_tests(session: nox.Session) -> None:
    """The engine's own tests on the stock engine too; `tests` has the manifest's numbers for it."""
    _system_packages(session)
    _core(session)
    variants = ("stock", "off", "on")
    _engine_tests(session, _engines(session, VLLM), variants, *session.posargs)


@nox.session
def e2e(session: nox.Session) -> None:
    """The patched engines serving a tiny model; arguments go to pytest."""
    _system_packages(session)
    _core(session)
    vllm = _engines(session, VLLM)
    _e2e(session, vllm, _engines(session, SGLANG), *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """The patched wheel in dist/; arguments go to `engine_forks build`, e.g. --variant cpu."""
    _install(session, "tomli; python_version < '3.11'")
    _forks(session, "build", *session.posargs)


@nox.session
def check_patches(session: nox.Session) -> None:
    """Every rule for the patch series."""
    _install(session, "tomli; python_version < '3.11'")
    _check_patches(session)


@nox.session
def demo(session: nox.Session) -> None:
    """Two engines sharing one machine's memory, on its GPU if there is one."""
    _system_packages(session)
    _core(session)
    engines = _engines(session, VLLM, "cuda" if Path("/dev/nvidiactl").exists() else "cpu")
    env = engines.environment(engines.patched)
    session.run("python", "-m", "benchmarks.demo", *session.posargs, env=env)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Prints the commands of the GPU tests and benchmarks."""
    text = (REPO / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        print(block)


def _install(session: nox.Session, *args: str) -> None:
    """Without compiling what is never imported; the rest is when it is, first."""
    session.install("--no-compile", *args)


def _lint(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "--strict", "-p", "kvcached_core", "-p", "engine_forks")
    # Many run on GPUs only: here it is known at least that the names they use exist.
    # (Half-typed functions are Triton kernels.)
    loose = [f"--disable-error-code={code}" for code in ("misc", "no-untyped-def")]
    loose += ["--allow-untyped-calls", "--allow-untyped-decorators", "--allow-any-generics"]
    loose += ["--no-warn-return-any", "--ignore-missing-imports", "--follow-imports=silent"]
    session.run("mypy", *loose, "-p", "benchmarks")
    sources = [
        str(path.relative_to(REPO))
        for folder in ("csrc", "tests")
        for path in sorted((REPO / folder).rglob("*"))
        if path.suffix in (".h", ".cpp", ".c")
    ]
    session.run("clang-format", "--dry-run", "--Werror", *sources)


def _cpp(session: nox.Session, *, silent: bool = False) -> None:
    """With `silent` one sees which commands run, the tests' results when they are done, and all
    that a command said that fails.
    """
    for sanitizer in SANITIZERS:
        build = Path(session.create_tmp()).resolve() / f"cpp-{sanitizer.partition(',')[0]}"
        session.run(
            "cmake",
            "-S",
            str(REPO / "csrc"),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DKVCACHED_PYTHON=OFF",
            "-DKVCACHED_TESTS=ON",
            f"-DKVCACHED_SANITIZE={sanitizer}",
            silent=silent,
        )
        session.run("cmake", "--build", str(build), "--parallel", JOBS, silent=silent)
        ctest = ["ctest", "--test-dir", str(build), "--output-on-failure", "--no-tests=error"]
        ctest += ["--timeout", "1200", "--parallel", JOBS]
        said = session.run(*_fixed_addresses(sanitizer), *ctest, external=True, silent=silent)
        if silent:
            print(said, flush=True)


def _fixed_addresses(sanitizer: str) -> list[str]:
    """GCC's thread sanitizer cannot place its shadow where the kernel randomises widely."""
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    try:
        wide = int(bits.read_text()) > 28
    except OSError:
        wide = False
    return ["setarch", "--addr-no-randomize"] if sanitizer == "thread" and wide else []


def _core(session: nox.Session) -> None:
    """Installs the core for the tests, and tries its wheel where nothing else is installed."""
    _install(session, *BUILD, *TEST)
    work = Path(session.create_tmp()).resolve() / "core"
    wheels = work / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    # A build folder of the session's own: the checkout's may belong to another Python.
    options = ("--no-build-isolation", f"--config-settings=build-dir={work / 'build'}")
    # Editable, or the sources in the current folder would hide the installed package.
    _install(session, *options, "--editable", ".[router,tracing]")
    make = ("pip", "wheel", "--no-deps", *options, "--wheel-dir", str(wheels), ".")
    session.run("python", "-m", *make)
    clean = work / "venv"
    session.run("python", "-m", "venv", "--clear", str(clean))
    python = str(clean / "bin" / "python")
    (built,) = wheels.glob("*.whl")
    session.run(python, "-m", "pip", "install", "--quiet", str(built), external=True)
    session.run(python, "-m", "pip", "check", external=True)
    # Isolated, or the sources in the current folder would be imported.
    code = "import kvcached_core._core as core; print('core wheel:', core.__file__)"
    session.run(python, "-I", "-c", code, external=True)


def _check_patches(session: nox.Session) -> None:
    for pin in sorted((REPO / "engine_forks" / "pins").glob("*.toml")):
        _forks(session, "check", pin.stem, "--variant", "cpu")


def _engines(session: nox.Session, fork: Fork, variant: str = "cpu") -> Engines:
    """Installs what the engine needs, and the stock and the patched engine beside each other."""
    tmp = Path(session.create_tmp()).resolve() / fork.pin
    tmp.mkdir(exist_ok=True)
    wanted = tmp / "requirements.txt"
    wanted.write_text(_forks(session, "requirements", fork.pin, "--variant", variant, "--tests"))
    deps = None if fork is VLLM else tmp / "deps"
    if deps is None:
        _install(session, "--requirement", str(wanted))
    else:
        _install_beside(session, wanted, deps)
    archive, released = _forks(session, "fetch", fork.pin, "source", variant).splitlines()
    options = ("--variant", variant, "--relax-torch", "--out", str(tmp / "dist"))
    patched = _forks(session, "build", fork.pin, *options).strip()
    engines = Engines(fork, Path(archive), tmp / "stock", tmp / "patched", deps)
    for source, target in ((released, engines.stock), (patched, engines.patched)):
        shutil.rmtree(target, ignore_errors=True)
        _install(session, "--no-deps", "--target", str(target), source)
        # Not the other engine, and for this machine: either mistake would make tests idle.
        code = (
            f"{fork.probe.format(variant=variant)};"
            f"assert engine.__file__.startswith({str(target)!r}), engine.__file__;"
            "print('engine:', engine.__version__)"
        )
        env = engines.environment(target) | (fork.cpu if variant == "cpu" else {})
        session.run("python", "-c", code, env=env)
    return engines


def _install_beside(session: nox.Session, wanted: Path, target: Path) -> None:
    """Installs into a folder what pip would add to the environment, or replace in it."""
    report = wanted.with_name("report.json")
    _install(session, "--dry-run", "--report", str(report), "--requirement", str(wanted))
    found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    shutil.rmtree(target, ignore_errors=True)
    names = [f"{entry['name']}=={entry['version']}" for entry in found]
    _install(session, "--no-deps", "--target", str(target), *names)


def _unit(session: nox.Session, *args: str) -> None:
    command = ("python", "-m", "pytest", "--ignore=tests/e2e")
    if args:
        session.run(*command, *args)
        return
    session.run(*command, *TWO, "--dist=worksteal", "--durations=10")


def _engine_tests(session: nox.Session, engines: Engines, names: Sequence[str], *args: str) -> None:
    folders = {"stock": engines.stock, "off": engines.patched, "on": engines.patched}
    variants = ",".join(f"{name}={folders[name]}" for name in names)
    out = Path(session.create_tmp()).resolve() / "engine-tests"
    command = ("--pin", engines.fork.pin, "--source", str(engines.archive), "--variant", variants)
    session.run(
        *("python", "-m", "ci.engine_tests", *command, "--jobs", JOBS, "--out", str(out)), *args
    )


def _e2e(session: nox.Session, vllm: Engines, sglang: Engines, *args: str) -> None:
    env = vllm.environment(vllm.patched) | sglang.folders()
    command = ("python", "-m", "pytest", "tests/e2e")
    if args:
        session.run(*command, *args, env=env)
        return
    session.run(*command, *TWO, "-m", "not alone", "--durations=25", env=env)
    session.run(*command, "-m", "alone", "--durations=10", env=env)


def _forks(session: nox.Session, *args: str) -> str:
    """Runs `python -m engine_forks` and returns what it printed."""
    command = ["python", "-m", "engine_forks", *args]
    session.log(" ".join(command))
    python = Path(session.bin) / "python"
    done = subprocess.run(
        [str(python), *command[1:]], cwd=REPO, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        session.error(f"engine_forks {args[0]} failed")
    return done.stdout


def _system_packages(session: nox.Session) -> None:
    """Installs the few things that pip cannot, or says which they are."""
    include = Path(sysconfig.get_paths()["include"])
    present: dict[str, Callable[[], bool]] = {
        "git": lambda: shutil.which("git") is not None,
        "g++": lambda: shutil.which("g++") is not None,
        "doctest-dev": lambda: Path("/usr/include/doctest/doctest.h").is_file(),
        "libnuma1": lambda: ctypes.util.find_library("numa") is not None,
        "python3-dev": lambda: (include / "Python.h").is_file(),
    }
    missing = [name for name, is_present in present.items() if not is_present()]
    apt = platform.system() == "Linux" and os.geteuid() == 0 and shutil.which("apt-get") is not None
    if missing and not apt:
        session.error(f"missing: apt-get install {' '.join(missing)}")
    # Without it the tests of the router's page are skipped.
    if apt and not any(map(shutil.which, ("chromium", "google-chrome"))):
        missing.append("chromium")
    if not missing:
        return
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    session.run("apt-get", "update", "--quiet", external=True)
    session.run(
        "apt-get", "install", "--yes", "--no-install-recommends", *missing, env=env, external=True
    )
