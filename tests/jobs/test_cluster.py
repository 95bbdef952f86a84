"""Rendered schedules: what is installed parses, has the fields its API has, and runs the very words that were given."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from cronsim import CronSim
from support.processes import ROOT

from ddpm_core.errors import InputError
from jobs.cluster.cron import parse_cron
from jobs.cluster.rendering import calendar, kubernetes_schedule

NIGHTLY = ["python", "jobs/nightly_eval.py", "--experiment", "church", "--storage", "/shared/runs"]
HOSTILE = [
    *("it's", 'say "hi"', "a b", " ", "", "100%", "%d%%", "\\%", "a\\", "\\\\%", "back\\slash\\n", "'%'"),
    *("$HOME", "${HOME}", "$(id)", "$(JOB_NAME)", "$$(JOB_NAME)", "$$", "$", "`id`", "a;b", ";", "&& false", "| cat"),
    *(
        "#x",
        "a #b",
        "*",
        "~",
        "!",
        "> x",
        "-",
        "--",
        "- x",
        ": {",
        "{{ name }}",
        "{% x %}",
        "@",
        "&a",
        "null",
        "é→",
        "%E",
    ),
]
KINDS: dict[str, list[str]] = {
    "crontab": [],
    "systemd": ["--time-zone", "Europe/Berlin"],
    "cronjob": [
        "--image",
        "registry.internal/ddpm:1",
        "--address",
        "http://ray-head-svc:8265",
        "--token-secret",
        "ray",
    ],
    "rayjob": ["--image", "registry.internal/ddpm:1", "--storage-claim", "shared", "--gpus", "1", "--workers", "8"],
    "raycronjob": [
        *("--image", "registry.internal/ddpm:1", "--storage-claim", "shared"),
        *("--time-zone", "Europe/Berlin", "--tracking-secret", "mlflow"),
    ],
}
Render = Callable[..., tuple[int, str, str]]


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Render:
    """Runs jobs/cluster/render.py with these arguments: its exit code, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jobs/cluster/render.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "jobs" / "cluster" / "render.py"), run_name="__main__")
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder of programs: `python` prints its words and ends with $CODE; `ray` submits as Ray does, which quotes the
    words again and gives them to a shell, and has only 0 and 1 for the end."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "python": "import json, os, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(int(os.environ.get('CODE', '0')))",
        "ray": "import os, shlex, subprocess, sys\n"
        "if sys.argv[1:3] == ['job', 'status']:\n"
        "    print('Job failed\\nStatus message: Job entrypoint command failed with exit code ' + os.environ['CODE']\n"
        "          + ', last available logs (truncated to 20,000 chars):\\ncommand failed with exit code 77')\n"
        "else:\n"
        "    words = sys.argv[sys.argv.index('--') + 1 :]\n"
        "    sys.exit(1 if subprocess.run(shlex.join(words), shell=True).returncode else 0)",
    }
    for name, code in scripts.items():
        (folder / name).write_text(f"#!{sys.executable}\n{code}\n")
        (folder / name).chmod(0o755)
    return folder


def runs(command: list[str], stubs: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    path = {"PATH": f"{stubs}:/usr/bin:/bin", "HOME": "/nonexistent"}
    return subprocess.run(command, env={**path, **environment}, cwd=ROOT, capture_output=True, text=True, check=False)


def cron_unescapes(text: str) -> str:
    """As Vixie cron reads a command: \\% is %, an unescaped % would end it; a backslash shields the next character."""
    out, shielded = "", False
    for letter in text:
        if shielded:
            out = out[:-1] + letter if letter == "%" else out + letter
            shielded = False
            continue
        assert letter != "%", "cron ends the command here"
        shielded = letter == "\\"
        out += letter
    return out


@pytest.mark.parametrize("submitted", [False, True])
def test_a_crontab_line_runs_the_given_words(submitted: bool, render: Render, stubs: Path, tmp_path: Path) -> None:
    log = tmp_path / "100% it's a log"
    options = ["--log", str(log), "--path", f"{stubs}:/usr/bin:/bin", "--project", str(ROOT)]
    code, out, _ = render(
        "crontab", *options, *(["--address", "http://a b%:8265"] if submitted else []), "--", *NIGHTLY, *HOSTILE
    )
    assert code == 0
    line = out.splitlines()[-1]
    assert line.startswith("0 2 * * * ")
    command = cron_unescapes(line.split(" ", 5)[5])
    for code in (0, 3):
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            env={"CODE": str(code), "HOME": "/"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert json.loads(log.read_text().splitlines()[0]) == [*NIGHTLY[1:], *HOSTILE]
        assert done.stdout == (f"nightly-eval: exit code 3: see {log}\n" if code else "")  # what cron mails
        assert done.stderr == ""


def systemd_words(line: str) -> list[str]:
    """The words of an ExecStart=: quotes and backslashes, then specifiers, then variables."""
    words = []
    for quoted, plain in re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', line):
        word = plain or re.sub(r"\\(.)", r"\1", quoted)
        assert not re.search(r"(?<!%)(?:%%)*%(?!%)", word), "a specifier"
        word = word.replace("%%", "%")
        assert not re.search(r"(?<!\$)(?:\$\$)*\$(?!\$)", word), "a variable"
        words.append(word.replace("$$", "$"))
    return words


def systemd_units(text: str) -> dict[str, str]:
    parts = re.split(r"# ==> \S*/(\S+) <==\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("address", ["", "http://a b%$:8265"])
def test_a_systemd_service_runs_the_given_words(address: str, render: Render, tmp_path: Path) -> None:
    project = tmp_path / "100% mine"
    project.mkdir()
    options = ["--address", address] if address else []
    code, out, _ = render("systemd", *options, "--project", str(project), "--", *NIGHTLY, *HOSTILE)
    assert code == 0
    units = systemd_units(out)
    service = units["nightly-eval.service"]
    words = systemd_words(re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)[0])
    submit = ["sh", "jobs/cluster/submit.sh"] if address else []
    assert words == ["/usr/bin/env", *submit, *NIGHTLY, *HOSTILE]
    assert re.findall(r"^WorkingDirectory=(.*)$", service, re.MULTILINE) == [str(project).replace("%", "%%")]
    assert "Restart=" not in service
    assert re.findall(r"^OnCalendar=(.*)$", units["nightly-eval.timer"], re.MULTILINE) == ["*-*-* 02:00:00"]
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    for name, unit in units.items():
        (tmp_path / name).write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in units)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "nightly-eval" in done.stderr) == (0, False), done.stderr


def read_working_directory(service: str) -> Path:
    """As systemd reads it: a backslash joins lines, white space at the ends goes, %% is %."""
    (line,) = re.findall(r"^WorkingDirectory=(.*)$", re.sub(r"\\\n", " ", service), re.MULTILINE)
    return Path(line.strip().replace("%%", "%"))


PROJECTS = [
    "/a b",
    "/ends in a space ",
    "/ends\\",
    "/ends\\\\",
    "/\"a\" 'b'",
    "/100%",
    "/100%h",
    "/$HOME",
    "/a;b#c",
    "/\\x2f",
    "/ü",
]


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_of_any_path_is_the_folder_a_schedule_runs_in(project: str, render: Render, stubs: Path) -> None:
    for kind in ("systemd", "crontab", "cronjob", "rayjob"):
        code, out, _ = render(kind, *KINDS[kind], "--project", project, "--", *NIGHTLY)
        assert code == 0
        if kind == "systemd":
            service = systemd_units(out)["nightly-eval.service"]
            assert read_working_directory(service) == Path(project)
            assert "\nEnvironment=" in re.sub(r"\\\n", " ", service)  # the next line is one of its own
        elif kind == "crontab":
            command = cron_unescapes(out.splitlines()[-1].split(" ", 5)[5])
            folder = re.sub(r"^cd (.*) && PATH=.*", r"\1", command)
            shown = subprocess.run(["/bin/sh", "-c", f"printf %s {folder}"], capture_output=True, text=True, check=True)
            assert shown.stdout == project
        else:
            folders = {
                inner.get("workingDir", project) for pod in pods(yaml.safe_load(out)) for inner in pod["containers"]
            }
            assert folders == {project}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_project_of_several_lines_is_refused(kind: str, render: Render) -> None:
    code, out, err = render(kind, *KINDS[kind], "--project", "/a\nb", "--", *NIGHTLY)
    assert (code, out) == (2, "")
    assert "must be one line without control characters" in err


EXPRESSIONS = [
    "0 2 * * *", "*/15 * * * *", "5,35 1-3 * * *", "0 2 * * 1-5", "0 2 * * 7", "0 4 1 * *", "0 4 1,15 * 0",
    "30 23 28-31 2,12 *", "0 2 * jan-mar mon,wed", "7 */6 * * 5-7", "0 3 */10 * *",
]  # fmt: skip


@pytest.mark.parametrize("every", EXPRESSIONS)
def test_systemds_calendar_has_the_times_of_the_cron_expression(every: str) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    base = datetime(2026, 1, 28, 12, tzinfo=ZoneInfo("UTC"))
    moments: set[str] = set()
    for line in calendar(every):
        shown = subprocess.run(
            ["systemd-analyze", "calendar", "--iterations=20", "--base-time=2026-01-28 12:00:00", line],
            capture_output=True, text=True, check=True, env={**os.environ, "TZ": "UTC"},
        ).stdout  # fmt: skip
        moments |= set(re.findall(r"(?:Next elapse|Iteration #\d+|Iter\. #\d+): \w+ (\S+ \S+)", shown))
    schedule = CronSim(every, base)
    wanted = [f"{next(schedule):%Y-%m-%d %H:%M:%S}" for _ in range(20)]
    assert sorted(moments)[:20] == wanted


@pytest.mark.parametrize(
    ("every", "said"),
    [
        ("0 2 * *", "has 4 fields"),
        ("@daily", "has 1 fields"),
        ("0 0 2 * * *", "has 6 fields"),
        ("0 25 * * *", "bad hour"),
        ("0 2 30 2 *", "bad day-of-month"),
        ("0 2 L * *", "not every scheduler knows L and #"),
        ("0 2 * * 1#2", "not every scheduler knows L and #"),
        ("0 2 */2 * 1", "name the days themselves"),
    ],
)
def test_an_expression_that_schedulers_read_differently_is_refused(every: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        parse_cron(every)
    assert "\n" not in str(error.value)


def test_sunday_is_0_for_kubernetes_and_the_rest_is_unchanged() -> None:
    assert [kubernetes_schedule(every) for every in EXPRESSIONS if "7" not in every.split()[4]] == [
        every for every in EXPRESSIONS if "7" not in every.split()[4]
    ]
    assert kubernetes_schedule("0 2 * * 7") == "0 2 * * 0"
    assert kubernetes_schedule("7 */6 * * 5-7") == "7 */6 * * 0,5,6"


def kubernetes_expands(text: str, variables: dict[str, str]) -> str:
    """As Kubernetes reads a container's command, arguments and environment: $$ is $, $(NAME) a variable that is there."""
    return re.sub(
        r"\$(?:\$|\((\w+)\))",
        lambda match: "$" if match[0] == "$$" else variables.get(match[1], match[0]),
        text,
    )


def container(pod: dict[str, Any]) -> dict[str, Any]:
    [only] = pod["containers"]
    assert isinstance(only, dict)
    return only


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_a_cronjob_runs_the_given_words_and_ends_with_their_exit_code(code: int, render: Render, stubs: Path) -> None:
    _, out, _ = render("cronjob", *KINDS["cronjob"], "--", *NIGHTLY, *HOSTILE)
    job = yaml.safe_load(out)["spec"]["jobTemplate"]["spec"]
    submit = container(job["template"]["spec"])
    plain = {entry["name"]: entry["value"] for entry in submit["env"] if "value" in entry}
    words = [kubernetes_expands(word, plain) for word in [*submit["command"], *submit["args"]]]
    done = runs(words, stubs, CODE=str(code), **plain)
    assert json.loads(done.stdout.splitlines()[0]) == [*NIGHTLY[1:], *HOSTILE]
    assert done.returncode == code
    policy = job["podFailurePolicy"]["rules"][0]
    assert policy["action"] == "FailJob"
    assert policy["onExitCodes"]["containerName"] == submit["name"]
    assert {2, 3} == set(policy["onExitCodes"]["values"])
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (1, "Never")


@pytest.mark.parametrize("kind", ["rayjob", "raycronjob"])
def test_a_rayjob_runs_the_given_words(kind: str, render: Render, stubs: Path) -> None:
    _, out, _ = render(kind, *KINDS[kind], "--", *NIGHTLY, *HOSTILE)
    spec = yaml.safe_load(out)["spec"]
    job = spec if kind == "rayjob" else spec["jobTemplate"]
    # KubeRay sets the entrypoint into a line of a submitter pod's shell.
    entrypoint = kubernetes_expands(job["entrypoint"], {"JOB_NAME": "expanded", "HOME": "expanded"})
    line = f"if ! false ; then ray job submit --address http://x:8265 --no-wait -- {entrypoint} ; fi"
    done = runs(["/bin/bash", "-ce", line], stubs)
    assert json.loads(done.stdout) == [*NIGHTLY[1:], *HOSTILE], done.stderr


# The fields of each object as its API has them: name -> type, ! where it is required. A list is an array of what is in
# it; `dict` a map from strings to strings.
SECRET_KEY = {"name!": str, "key!": str, "optional": bool}
POD_SECURITY = {
    "runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int, "fsGroupChangePolicy": str,
    "seccompProfile": {"type!": str, "localhostProfile": str}, "supplementalGroups": [int],
}  # fmt: skip
CONTAINER = {
    "name!": str, "image": str, "imagePullPolicy": str, "command": [str], "args": [str], "workingDir": str,
    "env": [{"name!": str, "value": str, "valueFrom": {"secretKeyRef": SECRET_KEY}}],
    "ports": [{"name": str, "containerPort!": int, "protocol": str}],  # and no hostPort
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool, "subPath": str}],
    "resources": {"requests": dict, "limits": dict},
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}, "readOnlyRootFilesystem": bool},
}  # fmt: skip
POD = {
    "restartPolicy": str, "automountServiceAccountToken": bool, "securityContext": POD_SECURITY, "containers!": [CONTAINER],
    "volumes": [{"name!": str, "persistentVolumeClaim": {"claimName!": str, "readOnly": bool}}],
    "nodeSelector": dict, "serviceAccountName": str, "terminationGracePeriodSeconds": int,
}  # fmt: skip
POD_TEMPLATE = {"metadata": {"labels": dict, "annotations": dict}, "spec": POD}
RAY_CLUSTER = {
    "upgradeStrategy": {"type": str}, "authOptions": {"mode": str, "secretName": str}, "suspend": bool, "managedBy": str,
    "autoscalerOptions": dict, "headServiceAnnotations": dict, "enableInTreeAutoscaling": bool,
    "gcsFaultToleranceOptions": dict, "rayVersion": str,
    "headGroupSpec!": {
        "template!": POD_TEMPLATE, "headService": dict, "enableIngress": bool, "resources": dict, "labels": dict,
        "rayStartParams": dict, "serviceType": str,
    },
    "workerGroupSpecs": [{
        "groupName!": str, "suspend": bool, "replicas": int, "minReplicas!": int, "maxReplicas!": int,
        "idleTimeoutSeconds": int, "resources": dict, "labels": dict, "rayStartParams": dict, "template!": POD_TEMPLATE,
        "scaleStrategy": dict, "numOfHosts": int,
    }],
}  # fmt: skip
RAY_JOB = {
    "activeDeadlineSeconds": int, "preRunningDeadlineSeconds": int, "backoffLimit": int, "rayClusterSpec": RAY_CLUSTER,
    "submitterPodTemplate": POD_TEMPLATE, "metadata": dict, "clusterSelector": dict, "submitterConfig": {"backoffLimit": int},
    "managedBy": str, "deletionStrategy": dict, "entrypoint": str, "runtimeEnvYAML": str, "jobId": str,
    "submissionMode": str, "entrypointResources": str, "entrypointNumCpus": float, "entrypointNumGpus": float,
    "ttlSecondsAfterFinished": int, "shutdownAfterJobFinishes": bool, "suspend": bool,
}  # fmt: skip
JOB = {
    "parallelism": int, "completions": int, "activeDeadlineSeconds": int, "backoffLimit": int,
    "ttlSecondsAfterFinished": int, "template!": POD_TEMPLATE,
    "podFailurePolicy": {"rules!": [{
        "action!": str, "onExitCodes": {"containerName": str, "operator!": str, "values!": [int]},
        "onPodConditions": [{"type!": str, "status": str}],
    }]},
}  # fmt: skip
CRON_JOB = {
    "schedule!": str, "timeZone": str, "startingDeadlineSeconds": int, "concurrencyPolicy": str, "suspend": bool,
    "jobTemplate!": {"metadata": {"labels": dict}, "spec": JOB}, "successfulJobsHistoryLimit": int,
    "failedJobsHistoryLimit": int,
}  # fmt: skip
SPECS = {
    ("batch/v1", "CronJob"): CRON_JOB,
    ("ray.io/v1", "RayJob"): RAY_JOB,
    ("ray.io/v1", "RayCronJob"): {"schedule!": str, "jobTemplate!": RAY_JOB, "suspend": bool, "timeZone": str},
}


def check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        known = {name.rstrip("!"): inner for name, inner in schema.items()}
        assert set(value) <= set(known), f"{where}: {set(value) - set(known)}"
        assert {name[:-1] for name in schema if name.endswith("!")} <= set(value), where
        for name, inner in value.items():
            check(inner, known[name], f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        assert value, where
        for number, inner in enumerate(value):
            check(inner, schema[0], f"{where}[{number}]")
    elif schema is dict:
        assert isinstance(value, dict), where
        quantity = where.endswith((".requests", ".limits"))
        assert all(isinstance(inner, str | int if quantity else str) for inner in value.values()), where
    else:
        assert type(value) is schema, f"{where}: {value!r}"


@pytest.mark.parametrize("kind", ["cronjob", "rayjob", "raycronjob"])
def test_a_manifest_has_the_fields_that_its_api_has_and_no_other(kind: str, render: Render) -> None:
    _, out, _ = render(kind, *KINDS[kind], "--namespace", "night", "--", *NIGHTLY)
    [document] = yaml.safe_load_all(out)
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert document["metadata"] == {"name": "nightly-eval", "namespace": "night"}
    check(document["spec"], SPECS[document["apiVersion"], document["kind"]], kind)


def pods(value: Any) -> list[dict[str, Any]]:
    """Every pod spec in a document."""
    if isinstance(value, list):
        return [pod for inner in value for pod in pods(inner)]
    if not isinstance(value, dict):
        return []
    return [value] if "containers" in value else [pod for inner in value.values() for pod in pods(inner)]


@pytest.mark.parametrize(("kind", "number"), [("cronjob", 1), ("rayjob", 3), ("raycronjob", 3)])
def test_pods_have_no_root_and_no_privileges_and_open_no_port(kind: str, number: int, render: Render) -> None:
    _, out, _ = render(kind, *KINDS[kind], "--", *NIGHTLY)
    all_pods = pods(yaml.safe_load(out))
    assert len(all_pods) == number
    for pod in all_pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["automountServiceAccountToken"] is False
        assert container(pod)["securityContext"]["allowPrivilegeEscalation"] is False
    assert not re.search("hostPort|hostNetwork|NodePort|LoadBalancer|privileged: true", out)
    if kind != "cronjob":
        assert "serviceType: ClusterIP" in out
        assert re.search(r"authOptions:\n +mode: token", out)


def test_no_secret_has_its_value_in_a_manifest(render: Render) -> None:
    _, out, _ = render("raycronjob", *KINDS["raycronjob"], "--", *NIGHTLY)
    head = [pod for pod in pods(yaml.safe_load(out)) if container(pod)["name"] == "ray-head"]
    keys = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container(head[0])["env"]}
    assert keys["MLFLOW_TRACKING_URI"] == {"name": "mlflow", "key": "MLFLOW_TRACKING_URI", "optional": False}
    assert keys["MLFLOW_TRACKING_PASSWORD"] == {"name": "mlflow", "key": "MLFLOW_TRACKING_PASSWORD", "optional": True}
    _, out, _ = render("cronjob", *KINDS["cronjob"], "--", *NIGHTLY)
    [token] = [entry for entry in container(pods(yaml.safe_load(out))[0])["env"] if entry["name"] == "RAY_AUTH_TOKEN"]
    assert token == {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "ray", "key": "auth_token"}}}


def test_a_training_has_the_workers_storage_and_retries_asked_for(render: Render) -> None:
    training = ["python", "jobs/train_lsun.py", "church", "--workers", "8"]
    _, out, _ = render("rayjob", *KINDS["rayjob"], "--retries", "2", "--", *training)
    document = yaml.safe_load(out)
    assert document["metadata"]["name"] == "train-lsun"
    assert document["spec"]["backoffLimit"] == 2
    assert document["spec"]["shutdownAfterJobFinishes"] is True  # without it the time to live is refused
    [group] = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 8
    worker = container(group["template"]["spec"])
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert worker["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    assert group["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "shared"}
    assert "lease" not in out  # which a training has not


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_rendering_tells_how_to_install_it_its_log_and_exit_code_3(kind: str, render: Render) -> None:
    _, out, _ = render(kind, *KINDS[kind], "--", *NIGHTLY)
    comments = "\n".join(line for line in out.splitlines() if line.lstrip().startswith("#"))
    install = {"crontab": "crontab -e", "systemd": "systemctl --user enable --now"}.get(kind, "kubectl apply -f")
    for text in (install, "Two at once are harmless", "xit code 3 is an alarm", "The log"):
        assert text in comments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no kind is given: put one of crontab, systemd"),
        (["airflow"], "kind 'airflow' is unknown: put one of crontab"),
        (["crontab"], "no command is given: put it last, after --"),
        (["crontab", "--every", "0 25 * * *", "--", *NIGHTLY], "--every is '0 25 * * *', and cron calls it a bad hour"),
        (["crontab", "--time-zone", "UTC", "--", *NIGHTLY], "option --time-zone is unknown"),
        (["crontab", "--project", "here", "--", *NIGHTLY], "--project is 'here', a relative path"),
        (["crontab", "--", "python", "a\nb"], "a word of the command is 'a\\nb': it must be one line"),
        (["crontab", "--", "x" * 1000], "characters and cron takes 999"),
        (["crontab", "--log", "a\nb", "--", *NIGHTLY], "--log is 'a\\nb': it must be one line"),
        (["systemd", "--time-zone", "Mars/Base", "--", *NIGHTLY], "--time-zone is 'Mars/Base', which is no time zone"),
        (["systemd", "--name", "Night Eval", "--", *NIGHTLY], "--name is 'Night Eval': give one of at most 36"),
        (["systemd", "--", "python", "9.py"], "--name would be '9': give one of at most 36"),
        (["cronjob", "--image", "i", "--", *NIGHTLY], "--address must be given"),
        (["rayjob", "--image", "i", "--", *NIGHTLY], "--storage-claim must be given"),
        (["rayjob", *KINDS["rayjob"], "--user", "0", "--", *NIGHTLY], "--user is 0: give a positive number"),
    ],
)
def test_a_wrong_request_ends_with_2_and_one_sentence(arguments: list[str], said: str, render: Render) -> None:
    code, out, err = render(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def readme_commands() -> list[str]:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", (ROOT / "jobs" / "README.md").read_text(), re.DOTALL))
    return [line.split("#")[0] for line in blocks.replace("\\\n", " ").splitlines() if "cluster/render.py" in line]


def test_the_readme_shows_every_kind() -> None:
    assert {shlex.split(line)[2] for line in readme_commands()} == set(KINDS)


@pytest.mark.parametrize("command", readme_commands())
def test_every_example_of_the_readme_renders(command: str, render: Render) -> None:
    code, out, err = render(*shlex.split(command)[2:])
    assert code == 0, err
    if shlex.split(command)[2] not in ("crontab", "systemd"):
        assert yaml.safe_load(out)["kind"]


REAL = """
import subprocess, time
from pipelines.demo.driver import ROOT
from pipelines.demo.local_ray import ray_cluster
with ray_cluster({}) as environment:
    for code in (0, 3):
        for _ in range(12):  # Ray gives its agent ten seconds to start, and then asks to try again
            command = ["sh", "jobs/cluster/submit.sh", "python", "-c", f"import sys; print('$HOME'); sys.exit({code})"]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if "No available agent" not in done.stderr:
                break
            time.sleep(5)
        print(f"code {code}: {done.returncode}", "$HOME" in done.stdout, done.stderr[-500:], flush=True)
"""


@pytest.mark.slow
def test_a_script_submitted_to_ray_itself_has_the_commands_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "submit.py"
    script.write_text(REAL)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "code 0: 0 True" in done.stdout, done.stdout + done.stderr
    assert "code 3: 3 True" in done.stdout
