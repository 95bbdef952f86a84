"""The commands a person types: complete help, one sentence for an error, exit codes, nothing half-written."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import run_job
from support.processes import ROOT

JOBS = [
    "preprocess.py",
    "train_lsun.py",
    "train_celebahq.py",
    "train_cifar10.py",
    "sweep.py",
    "evaluate.py",
    "compress.py",
    "export.py",
    "plan.py",
    "report.py",
    "demo.py",
    "nightly_eval.py",
    "ui.py",
]


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_every_option_with_what_it_means(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(monkeypatch, job, "--help") == 0
    out = capsys.readouterr().out
    assert f"python jobs/{job}" in out
    wanted = {
        "preprocess.py": ["--source", "--output", "--image-size", "--filter {lanczos,bicubic,box}"],
        "train_lsun.py": ["church, bedroom, bedroom-large, cat, tiny", "--shards", "--unet.ch", "--optim.lr"],
        "train_celebahq.py": ["--diffusion.schedule", "500000", "fixedsmall"],
        "train_cifar10.py": ["--optim.ema-decay", "800000", "fixedlarge"],
        "sweep.py": ["schedules PRESET", "ablation PRESET", "space PRESET"],
        "evaluate.py": [
            "--run",
            "--extractor",
            "--samples",
            "50000",
            "--sampler {ancestral,ddim,dpmpp_2m,dpmpp_2m_second_order}",
        ],
        "compress.py": ["encode --run RUN --images", "decode --run RUN --files", "curve --run RUN --data"],
        "export.py": ["RUN", "--format {diffusers}", "--weights {ema,raw}"],
        "plan.py": ["--model {cifar10,", "--workers", "126227", "--utilisation", "--json"],
        "report.py": ["--output", "--experiment"],
        "ui.py": ["--storage", "--open"],
        "demo.py": ["--storage"],
        "nightly_eval.py": ["--hours", "--samples", "10000", "--alarm-command"],
    }
    for text in wanted[job]:
        assert text in out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("preprocess.py --source nowhere --output out --image-size 8", "nowhere' does not exist"),
        ("preprocess.py --output out --image-size 8", "--source must be given"),
        ("preprocess.py --source . --output out --image-size 8 --imagesize 9", "option --imagesize is unknown"),
        ("preprocess.py --source . --output out --image-size eight", "--image-size"),
        ("preprocess.py --source . --output out --image-size 0", "--image-size is 0: give a number from 1 to 4,096"),
        ("preprocess.py --source empty --output out --image-size 8", "empty' holds no images"),
        ("train_lsun.py", "no recipe is given: put one of church"),
        (
            "train_lsun.py chruch --shards out",
            "recipe 'chruch' is unknown (did you mean church?): choose one of church",
        ),
        ("train_lsun.py tiny", "--shards must be given"),
        ("train_lsun.py tiny --shards empty", "empty' has no manifest.json"),
        ("train_lsun.py tiny --shards nowhere", "nowhere' does not exist"),
        ("train_lsun.py tiny --shards empty --unet.ch 33", "it must be a multiple of 32"),
        ("train_lsun.py tiny --shards empty --steps 0", "--steps is 0: give a positive number"),
        ("train_lsun.py tiny --shards empty --diffusion.schedule cubic", "'cubic'"),
        ("train_cifar10.py --shards s3://bucket/cifar", "data set 's3://bucket/cifar' does not exist"),
        ("evaluate.py --run nobody", "run 'nobody' is not known"),
        ("evaluate.py", "give a run, or a folder of weights in its place"),
        ("evaluate.py compare one", "what it is about must be given"),
        ("evaluate.py compare one other", "'one' holds no finished evaluation"),
        ("evaluate.py likelihood --run nobody", "run 'nobody' is not known"),
        ("evaluate.py calibrate --data empty --test-data empty", "empty' has no manifest.json"),
        ("sweep.py", "sweep '' is unknown: choose schedules, ablation, space"),
        ("sweep.py schedules giant --train.shards empty", "preset 'giant' is unknown: choose one of cifar10"),
        ("sweep.py schedules tiny --train.shards empty --schedules linear cubic", "'cubic'"),
        ("sweep.py space tiny --train.shards empty", "--grid and --draw are empty"),
        ("sweep.py space tiny --train.shards empty --grid optim.lrr=1", "option --optim.lrr is unknown"),
        ("sweep.py space tiny --train.shards empty --grid unet.ch=33", "it must be a multiple of 32"),
        ("sweep.py ablation --train.diffusion.var-type learned", "--train.shards must be given"),
        ("compress.py", "no command is given: put one of encode, decode, curve first"),
        ("compress.py shrink", "'shrink' is unknown: put one of encode, decode, curve first"),
        ("compress.py encode --run nobody --images a.png --output out", "run 'nobody' is not known"),
        ("compress.py decode --run nobody --files a.x0 --batch-size 0 --output out", "--batch-size is 0"),
        ("compress.py curve --run nobody --data empty --output out", "run 'nobody' is not known"),
        ("export.py", "what it is about, --output must be given"),
        ("export.py nobody --output out", "run 'nobody' is not known"),
        ("plan.py --gpu H20", "--gpu is 'H20', whose peak FLOP/s are not known here"),
        ("plan.py --workers 4", "--train-workers is 8, more than --workers 4: give at most as many"),
        (
            "plan.py --train-workers 128 --workers 128",
            "--train-workers is 128 for a batch of 64: each needs an image, so give at most 64",
        ),
        ("plan.py --sampler-steps 2000", "--sampler-steps is 2000: the schedule of lsun_church has 1,000 timesteps"),
        ("report.py --output r.html --experiment none", "runs/mlflow.db does not exist"),
        ("nightly_eval.py", "experiment 'ddpm' is not in"),
        ("ui.py", "runs/mlflow.db' does not exist: train first"),
    ],
)
def test_a_wrong_command_ends_with_2_and_one_sentence_and_leaves_nothing(
    command: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    s3_bucket: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    job, *arguments = command.split()
    assert run_job(monkeypatch, job, *arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    "shell",
    [
        "{job} --help | head -1",
        "{job} --help | true",
        "{job} --help >&-",
        "{job} --help > /dev/full",
    ],
)
def test_nobody_reading_the_output_is_no_error(shell: str) -> None:
    job = f"{sys.executable} jobs/train_cifar10.py"
    command = ["bash", "-o", "pipefail", "-c", shell.format(job=job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


SCRIPT = """
import subprocess, sys, time
from pipelines.demo.driver import ROOT
from pipelines.demo.local_ray import ray_cluster
with ray_cluster({}) as environment:
    for arguments in (["--help"], ["tiny", "--shards", "relative/path", "--storage", "/tmp/unused"]):
        command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/train_lsun.py", *arguments]
        for _ in range(6):  # Ray gives its agent ten seconds to start, and then asks to try again
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if "No available agent" not in done.stderr:
                break
            time.sleep(5)
        print(done.stdout, done.stderr, f"exit code {done.returncode}", flush=True)
"""


@pytest.mark.slow
def test_a_submitted_job_prints_its_help_and_refuses_relative_paths(tmp_path: Path) -> None:
    script = tmp_path / "submit.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=None, check=False
    )
    helped, refused = done.stdout.split("exit code ")[:2]
    assert "--optim.ema-decay" in helped, done.stderr
    assert refused.startswith("0")
    assert "--shards is 'relative/path', a relative path: a submitted job runs in a temporary copy" in refused
    assert "Traceback" not in refused
    assert not (tmp_path / "runs").exists()
