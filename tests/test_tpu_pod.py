"""launch/tpu_pod.sh and what it runs on each worker, in a cloud that is a folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from launch_helpers import COMMAND, write_stubs

SLICE = ["--name", "icae", "--zone", "us-west4-a", "--type", "v5litepod-16"]
# A stand-in for gcloud. In $CLOUD `slice` and `queue` are states, w0 and w1 the workers' homes,
# and `calls` has a line for each call. A worker's commands run here, in its home.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
cloud = pathlib.Path(os.environ["CLOUD"])
slice, queue = cloud / "slice", cloud / "queue"
kind, verb, *rest = sys.argv[3:]
flags = dict(a[2:].partition("=")[::2] for a in rest if a.startswith("--"))
with open(cloud / "calls", "a") as f:
    f.write(json.dumps([kind, verb, rest]) + "\\n")
def fail(message):
    sys.exit(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) {message}")
def provide():
    slice.write_text("READY")
    for home in homes:
        home.mkdir()
homes = [cloud / "w0", cloud / "w1"]
if (cloud / "offline").exists():
    fail("UNAVAILABLE")
elif verb == "create":
    (cloud / "no_capacity").exists() and fail("RESOURCE_EXHAUSTED")
    queue.write_text("WAITING_FOR_RESOURCES") if kind == "queued-resources" else provide()
elif verb == "delete":
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)
    slice.unlink(missing_ok=True), queue.unlink(missing_ok=True)
elif verb == "describe":
    which = queue if kind == "queued-resources" else slice
    which.exists() or fail("NOT_FOUND: Resource was not found")
    if which == queue and slice.exists():
        queue.write_text("SUSPENDED" if slice.read_text() == "PREEMPTED" else "ACTIVE")
    print(which.read_text().strip())
    if which == queue and not slice.exists():
        provide()
elif slice.read_text() != "READY":
    fail("TPU is in an unusable state")
elif verb == "scp":
    for home in homes:
        shutil.copy(rest[0], home)
else:
    for i, home in enumerate(homes):
        if flags["worker"] in ("all", str(i)):
            environment = os.environ | {"HOME": str(home), "WORKER": str(i)}
            command = ["bash", "-c", flags["command"]]
            code = subprocess.run(command, cwd=home, env=environment).returncode
            code and sys.exit(code)
"""
# A stand-in for icae. `plan` has one word for each attempt: an exit code, `late` (0 after a while),
# `preempt` or `hang`. In `1,hang` the first is worker 0's, the second worker 1's.
ICAE = """
n=$(($(cat "$CLOUD/attempts-$WORKER" 2>/dev/null || echo 0) + 1))
echo "$n" >"$CLOUD/attempts-$WORKER"
printf '%s\\0' icae "$@" >"$CLOUD/argv-$WORKER"
read -ra plan <"$CLOUD/plan"
IFS=, read -ra words <<<"${plan[n - 1]}"
word=${words[WORKER]-${words[0]}}
echo "attempt $n: $word"
trap 'touch "$CLOUD/saved-$WORKER"; exit 75' TERM
[[ $word != preempt ]] || echo PREEMPTED >"$CLOUD/slice"
case $word in [0-9]*) exit "$word" ;; late) sleep 1 && touch "$CLOUD/done-$WORKER" && exit 0 ;; esac
while [[ -d $HOME ]]; do sleep 0.05; done
"""
STUBS = {
    "uv": '[[ $1 != venv ]] || { mkdir -p .venv/bin && cp "$CLOUD/bin/icae" .venv/bin; }',
    "mountpoint": '[[ -f "$HOME/mounted" ]]',
    "gcsfuse": '[[ ! -f "$HOME/mounted" ]] && echo "$@" >"$HOME/mounted"',
    "sudo": ":",
    "fusermount": ":",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A git repository that holds launch/ alone."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "launch"]):
        subprocess.run([*git, *command], check=True)
    return root


@pytest.fixture
def cloud(tmp_path, checkout):
    """Runs tpu_pod.sh in a cloud of its own.

    Returns the finished process, the calls of gcloud, and the cloud's folder.
    """
    folder = tmp_path / "cloud"
    (tmp_path / "gcloud.py").write_text(GCLOUD)
    environment = write_stubs(
        folder / "bin",
        STUBS
        | {"icae": ICAE, "gcloud": f'exec "{sys.executable}" -SE "{tmp_path}/gcloud.py" "$@"'},
    )

    def run(*flags, plan="0", faults=(), interrupt=False, command=COMMAND):
        (folder / "plan").write_text(plan + "\n")
        for name in faults:
            (folder / name).touch()
        command = [
            "bash",
            checkout / "launch" / "tpu_pod.sh",
            *SLICE,
            "--poll",
            "0.01",
            *flags,
            "--",
            *command,
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(
            command, env=environment | {"CLOUD": str(folder)}, **pipes
        ) as process:
            while interrupt and not (folder / "attempts-1").exists():
                time.sleep(0.02)
            if interrupt:
                process.terminate()
            stdout, stderr = process.communicate(timeout=60)
        out = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
        calls = (folder / "calls").read_text() if (folder / "calls").exists() else ""
        return out, [json.loads(line) for line in calls.splitlines()], folder

    return run


def words(calls):
    """The verb of each call that changes something; for ssh, the verb of tpu_worker.sh."""
    done = []
    for _, verb, rest in calls:
        if verb == "ssh":
            verb = remote(rest)[0]
        if verb not in ("describe", "status", "log"):
            done.append(verb)
    return done


def remote(arguments):
    """The arguments that an ssh gives to launch/tpu_worker.sh."""
    command = next(a for a in arguments if a.startswith("--command="))
    return shlex.split(command)[shlex.split(command).index("icae_jax/launch/tpu_worker.sh") + 1 :]


INSTALL, START = ["scp", "install"], ["stop", "mount", "start"]


def check_slices(calls, queued):
    """All slices are the same, as the flags say, and each is deleted as it was made."""
    made, gone = (
        [(kind, rest) for kind, verb, rest in calls if verb == which]
        for which in ("create", "delete")
    )
    flags = {"icae", "--spot", "--zone=us-west4-a", "--accelerator-type=v5litepod-16"}
    flags |= (
        {"--runtime-version=v2-alpha-tpuv5-lite", "--node-id=icae"}
        if queued
        else {"--version=v2-alpha-tpuv5-lite"}
    )
    assert len(made) == len(gone) and {kind for kind, _ in made + gone} == {
        "queued-resources" if queued else "tpu-vm"
    }
    assert all(set(rest) == flags for _, rest in made) and all(
        ("--force" in rest) == queued for _, rest in gone
    )


@pytest.mark.parametrize("queued", [False, True], ids=["on demand", "queued"])
def test_a_pod_is_restarted_recreated_and_deleted(cloud, queued):
    """Breaks when a saved or crashed run is not restarted, or a preempted slice not replaced.

    Also when an argument changes on its way, or a slice is left behind.
    """
    out, calls, folder = cloud(
        "--spot",
        "--mount",
        "gs://bucket:/mnt/runs",
        *["--queued"] * queued,
        plan="75 preempt 0,134 0",
    )
    assert out.returncode == 0, out.stderr
    assert words(calls) == [
        "create",
        *INSTALL,
        *START,
        *START,
        "delete",
        "create",
        *INSTALL,
        *START,
        *START,
        "delete",
    ]
    check_slices(calls, queued)
    assert not (folder / "slice").exists()
    assert all(
        (folder / f"argv-{worker}").read_text().split("\0")[:-1] == COMMAND for worker in "01"
    )
    assert re.findall("^attempt [^2].*", out.stdout, re.MULTILINE) == [
        "attempt 1: 75",
        "attempt 3: 0",
        "attempt 4: 0",
    ]


@pytest.mark.parametrize("queued", [False, True], ids=["on demand", "queued"])
def test_a_dry_run_shows_the_commands_of_a_run(tmp_path, queued):
    """Breaks when the printed commands differ from a run's, do not survive a shell, or are run."""
    nothing = write_stubs(tmp_path / "bin", {"gcloud": "echo ran", "git": "echo ran"})
    flags = ["--spot", "--mount", "bucket:/mnt/runs", *["--queued"] * queued]
    command = ["bash", ROOT / "launch" / "tpu_pod.sh", *SLICE, *flags, "--dry_run", "--", *COMMAND]
    shown = subprocess.run(command, capture_output=True, text=True, env=nothing, check=True).stdout
    assert "ran\n" not in shown and shown.index("exit code 75") < shown.index(
        "is LOST"
    ) < shown.index("exit code 0")
    stubs = "git() { :; }; sleep() { :; }; gcloud() { printf '%s\\0' \"$@\"; echo; }\n"
    read = subprocess.run(
        ["bash", "-c", stubs + shown], capture_output=True, text=True, check=True
    ).stdout
    calls = [
        (kind, verb, rest)
        for _, _, kind, verb, *rest in (line.split("\0")[:-1] for line in read.splitlines())
    ]
    assert words(calls) == [
        "create",
        *INSTALL,
        *START,
        *START,
        "delete",
        "create",
        *INSTALL,
        *START,
        "delete",
    ]
    check_slices(calls, queued)
    started = [remote(rest) for _, verb, rest in calls if verb == "ssh"]
    assert [argv for argv in started if argv[0] == "start"] == 3 * [["start", *COMMAND]]


@pytest.mark.parametrize("code", [2, 3])
def test_a_pod_does_not_repeat_what_cannot_succeed(cloud, code):
    """Breaks when exit code 2 or 3 of any worker is retried, or hidden by another's crash."""
    out, calls, folder = cloud(plan=f"{code},134 0")
    assert (
        out.returncode == code
        and words(calls) == ["create", *INSTALL, "stop", "start", "delete"]
        and not (folder / "slice").exists()
    )


@pytest.mark.parametrize(
    "code, starts", [(0, 1), (2, 1), (3, 1), (75, 2), (1, 2), (137, 2), (134, 2)]
)
def test_restarts_by_exit_code(cloud, code, starts):
    """Breaks when a run that can continue is not restarted, one that cannot is, or slices stay."""
    out, calls, folder = cloud(plan=f"{code} 0")
    assert out.returncode == (code if starts == 1 else 0) and words(calls).count("start") == starts
    assert (
        words(calls)[0] == "create"
        and words(calls)[-1] == "delete"
        and words(calls).count("delete") == 1
    )
    assert not (folder / "slice").exists() and f"exit code {out.returncode}" in out.stderr


SECRETS = [
    "HF_TOKEN=hf_S3CRET one",
    "WANDB_API_KEY=S3CRET; two",
    "NAME=S3CRET=three",
    "Q='S3CRET' \"four\"",
]


@pytest.mark.parametrize(
    "way",
    ["done", "failed", "interrupted", "dry run", "without env", "before the command", "within"],
)
def test_what_a_command_is_given_in_secret_is_not_shown(cloud, way):
    """Breaks when a secret variable or flag is printed, or does not reach the command unchanged."""
    secret_flags = ["--hub_token", "S3CRET", "--api-key=S3CRET", "--steps=7"]
    flags, code, told = [], 0, {"command": ["env", *SECRETS, *COMMAND, *secret_flags]}
    if way == "failed":
        flags, code, told["plan"] = ["--max_restarts", "1"], 1, "1 1"
    elif way == "interrupted":
        code, told["plan"], told["interrupt"] = 130, "hang", True
    elif way == "dry run":
        flags = ["--dry_run"]
    elif way == "without env":
        told, code = {"command": [SECRETS[0], *COMMAND]}, 2
    elif way == "before the command":
        flags, code = [SECRETS[0]], 2
    elif way == "within":
        line = "export HF_TOKEN='S3CRET' LOGIN=https://me:S3CRET@host; icae train"
        told = {"command": ["bash", "-c", line]}
    out, calls, folder = cloud(*flags, **told)
    said = out.stdout + out.stderr
    assert out.returncode == code and "S3CRET" not in said, said
    if code != 2:
        assert "HIDDEN" in said and (way == "within" or "--steps=7" in said)
    started = [
        remote(rest)[1:] for _, verb, rest in calls if verb == "ssh" and remote(rest)[0] == "start"
    ]
    assert started == [told["command"]] * {"failed": 2, "dry run": 0}.get(
        way, 0 if code == 2 else 1
    )
    if way in ("done", "failed"):
        assert (folder / "argv-1").read_text().split("\0")[:-1] == told["command"][
            1 + len(SECRETS) :
        ]
    for home in ("w0", "w1"):  # which ends what still runs
        shutil.rmtree(folder / home, ignore_errors=True)


def test_what_a_worker_says_of_each_exit_code(tmp_path):
    """Breaks when an exit code is lost, or a killed process counts as running or done."""
    worker = ["bash", str(ROOT / "launch" / "tpu_worker.sh")]

    def run(code, *arguments):
        (tmp_path / str(code)).mkdir(exist_ok=True)
        environment = os.environ | {"HOME": str(tmp_path / str(code))}
        return subprocess.run(
            [*worker, *arguments], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    codes = (0, 2, 3, 75, 1, 137, 134)
    for code in codes:
        run(code, "start", "bash", "-c", f"exit {code}")
    run("killed", "start", "sleep", "60")
    assert run("killed", "status") == "running"
    os.killpg(int((tmp_path / "killed" / "icae_run" / "group").read_text()), 9)
    want, deadline = [*map(str, codes), "137"], time.monotonic() + 30
    while (
        told := [run(code, "status") for code in (*codes, "killed")]
    ) != want and time.monotonic() < deadline:
        time.sleep(0.05)
    assert told == want


@pytest.mark.parametrize(
    "flags, attempts, why",
    [(["--max_restarts", "1"], 2, "--max_restarts"), ([], 6, "six failures")],
)
def test_a_pod_is_given_up_after_many_crashes(cloud, flags, attempts, why):
    """Breaks when a run that always crashes keeps its slice, or the last code is not returned."""
    out, calls, _ = cloud(*flags, plan="1 " * 9)
    assert (
        out.returncode == 1
        and why in out.stderr
        and words(calls).count("start") == attempts
        and words(calls)[-1] == "delete"
    )
    assert out.stdout.count(f": attempt {attempts}: 1") == 2  # every worker's last lines


def test_a_worker_left_behind_is_stopped_before_the_restart(cloud):
    """Breaks when a process that survives another worker's crash keeps the TPU, or cannot save."""
    out, calls, folder = cloud("--grace", "1", "--keep", plan="134,hang late")
    assert out.returncode == 0 and words(calls) == [
        "create",
        *INSTALL,
        *["stop", "start"] * 2,
        "stop",
    ]
    assert (
        (folder / "saved-1").exists()
        and (folder / "slice").read_text() == "READY"
        and "delete icae" in out.stderr
    )
    assert re.findall("^attempt .*", out.stdout, re.MULTILINE) == [
        "attempt 1: 134",
        "attempt 2: late",
    ]


def test_a_slice_stays_until_its_last_worker_is_done(cloud):
    """Breaks when the first worker's exit code 0 ends the run while the others still write."""
    out, _, folder = cloud(plan="0,late")
    assert out.returncode == 0 and (folder / "done-1").exists() and not (folder / "slice").exists()
    assert out.stdout == "attempt 1: 0\n"  # once, however often it was looked at


def test_an_interrupted_launcher_says_what_stays(cloud):
    """Breaks when Ctrl-C ends the run itself, or leaves a slice that costs money without a word."""
    out, calls, folder = cloud("--zone=us-east5-b", plan="hang", interrupt=True)
    assert (
        out.returncode == 130
        and "gcloud compute tpus tpu-vm delete icae --zone=us-east5-b" in out.stderr
    )
    assert words(calls)[-1] == "start" and (folder / "slice").exists()
    shutil.rmtree(folder / "w0")  # which ends what still runs
    shutil.rmtree(folder / "w1")


@pytest.mark.parametrize(
    "fault, message, done",
    [("no_capacity", "RESOURCE_EXHAUSTED", ["create"] * 3), ("offline", "UNAVAILABLE", [])],
)
def test_a_slice_that_cannot_be_had(cloud, fault, message, done):
    """Breaks when a wrong zone or type is retried forever.

    Also when a slice that gcloud cannot describe counts as missing.
    """
    out, calls, _ = cloud(faults=[fault])
    assert out.returncode == 1 and message in out.stderr and words(calls) == done


def test_a_pod_gets_committed_code_alone(cloud, checkout):
    """Breaks when the workers silently run something else than what the checkout holds."""
    script = checkout / "launch" / "experiments" / "stories.sh"
    text = script.read_text()
    script.write_text(text + "#\n")
    try:
        out = subprocess.run(
            ["bash", checkout / "launch" / "tpu_pod.sh", *SLICE, "--", "true"],
            capture_output=True,
            text=True,
        )
    finally:
        script.write_text(text)
    assert out.returncode == 2 and "not committed" in out.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--zone", "z", "--type", "v4-8", "--", "true"], "--name is missing"),
        (["--name", "n", "--type", "v4-8", "--", "true"], "--zone is missing"),
        ([*SLICE], "no command"),
        ([*SLICE, "icae", "train"], "unknown argument icae"),
        ([*SLICE, "--spots", "--", "true"], "unknown argument --spots"),
        ([*SLICE, "--mount", "--", "true"], "--mount needs a value"),
        ([*SLICE, "--mount", "bucket", "--", "true"], "--mount is bucket"),
        ([*SLICE, "--name=My Pod", "--", "true"], "--name is My Pod"),
        ([*SLICE, "--type", "v9-8", "--", "true"], "--type is v9-8"),
        ([*SLICE, "--max_restarts", "many", "--", "true"], "--max_restarts is many"),
        ([*SLICE, "--poll", "often", "--", "true"], "--poll is often"),
        ([*SLICE, "--grace", "0.5", "--", "true"], "--grace is 0.5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_of_a_pod_are_named(flags, message):
    """Breaks when a mistyped flag is found out on a slice that costs money."""
    out = subprocess.run(
        ["bash", ROOT / "launch" / "tpu_pod.sh", *flags], capture_output=True, text=True
    )
    assert out.returncode == 2 and message in out.stderr and not out.stdout
