"""Small changes of the code that the tests must notice: python tests/mutants.py --sample 40 --seed 0 (make mutants)

A seeded sample of all mutants that cosmic-ray makes of the mathematics and of the pure modules of the pipelines (an operator or
comparison replaced, a number one more or less, a condition turned round) runs against each module's own default tests, in a copy
of the tree. A survivor is printed with its change: write the test that kills it, or say why nobody can tell the two apart.
"""

import argparse
import difflib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cosmic_ray.ast  # type: ignore[import-untyped]
from cosmic_ray.mutating import mutate_code  # type: ignore[import-untyped]
from cosmic_ray.plugins import get_operator, operator_names  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
# Modules whose tests are not those of their name.
TESTS = {
    "pipelines/shards/order.py": "tests/pipelines/shards tests/pipelines/train/test_loader.py",
    "pipelines/sweep/ranking.py": "tests/pipelines/sweep/test_sweep_ranking.py",
    "pipelines/sweep/points.py": "tests/pipelines/sweep tests/jobs/test_command_lines.py",
    "pipelines/nightly/alarms.py": "tests/pipelines/nightly/test_alarms.py",
    "pipelines/storage/chunks.py": "tests/pipelines/runtime",
    "pipelines/storage/layout.py": "tests/pipelines/runtime tests/pipelines/checkpoints/test_select.py",
    "pipelines/checkpoints/retention.py": "tests/pipelines/checkpoints/test_saver.py",
    "ddpm_core/checks.py": "tests/core/test_diffusion.py tests/core/test_samplers.py",
    "ddpm_core/gaussian.py": "tests/core/test_diffusion.py tests/core/test_losses.py tests/core/test_likelihood.py",
    "ddpm_core/pixel_range.py": "tests/core/test_images.py",
    "ddpm_core/training.py": "tests/core/test_training.py tests/core/test_execution.py",
    "ddpm_core/typed.py": "tests/test_damaged_files.py",
}
NEED_ARGUMENTS = {"core/VariableReplacer", "core/VariableInserter"}
CPU_SECONDS = 240  # that a process may use for the tests of one mutant, such as one with a loop that no longer ends


class Mutant(NamedTuple):
    """The occurrence of an operator in a module."""

    module: str
    operator: str
    occurrence: int


def tests_of(module: str) -> str | None:
    """The tests of a module, None if it has none of its own."""
    if module in TESTS:
        return TESTS[module]
    path = Path(module)
    for candidate in (f"tests/core/test_{path.stem}.py", f"tests/core/{path.parent.name}"):
        if module.startswith("ddpm_core") and (ROOT / candidate).exists():
            return candidate
    return None


def modules() -> list[str]:
    core = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "ddpm_core").rglob("*.py"))]
    return [module for module in [*core, *sorted(TESTS)] if tests_of(module) is not None and (ROOT / module).is_file()]


def mutants(module: str) -> list[Mutant]:
    """All of a module's mutants."""
    tree = cosmic_ray.ast.get_ast((ROOT / module).read_text(encoding="utf-8"))
    nodes = list(cosmic_ray.ast.ast_nodes(tree))
    found = []
    for name in sorted(set(operator_names()) - NEED_ARGUMENTS):
        operator = get_operator(name)()
        count = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        found += [Mutant(module, name, occurrence) for occurrence in range(count)]
    return found


def survives(mutant: Mutant, tree: Path) -> str | None:
    """The change if the tests do not notice it, None if they do. tree: a copy of the project, as it was again after."""
    path = tree / mutant.module
    code = path.read_text(encoding="utf-8")
    changed = mutate_code(code.encode("utf-8"), get_operator(mutant.operator)(), mutant.occurrence)
    if changed is None:
        return None
    changed = changed if isinstance(changed, str) else changed.decode("utf-8")
    path.write_text(changed, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *str(tests_of(mutant.module)).split(),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))

    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, preexec_fn=limit, check=False)
    finally:
        path.write_text(code, encoding="utf-8")
    if done.returncode != 0:
        return None
    lines = difflib.unified_diff(code.splitlines(), changed.splitlines(), mutant.module, mutant.operator, "", "", 0, "")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", action="append", help="only this one, such as ddpm_core/schedules.py")
    options = parser.parse_args()
    chosen = options.module or modules()
    population = [mutant for module in chosen for mutant in mutants(module)]
    sample = random.Random(options.seed).sample(population, min(options.sample, len(population)))
    print(f"{len(sample)} of {len(population):,} mutants of {len(chosen)} modules, seed {options.seed}", flush=True)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="ddpm-mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__"))
        for number, mutant in enumerate(sample, 1):
            change = survives(mutant, tree)
            counts["killed" if change is None else "survived"] += 1
            print(
                f"{number:4} {'killed' if change is None else 'SURVIVED'} {mutant.module} {mutant.operator}", flush=True
            )
            if change is not None:
                print(change, flush=True)
    print(f"{counts['killed']} killed, {counts['survived']} survived")
    sys.exit(1 if counts["survived"] else 0)


if __name__ == "__main__":
    main()
