"""launch/slurm.sbatch, with stubs for srun and scontrol."""

import re
import shlex
import subprocess

import pytest
from conftest import ROOT
from launch_helpers import COMMAND, write_stubs


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sbatch as a job whose step exits with $STEP.

    Returns the finished process, the arguments of srun, and those of scontrol.
    """
    stubs = {name: f'printf "%s\\0" "$@" >"{tmp_path}/{name}"' for name in ("srun", "scontrol")}
    stubs["srun"] += '; echo trained; echo -ne "50 %\\r$said" >&2; exit "$STEP"'
    clean = {
        key: value
        for key, value in write_stubs(tmp_path / "bin", stubs).items()
        if not key.startswith(("SLURM_", "MAX_RESTARTS"))
    }

    def run(*arguments, **environment):
        command = ["bash", ROOT / "launch" / "slurm.sbatch", *arguments]
        (tmp_path / "err").write_text("before the requeue\n")
        with open(tmp_path / "err", "a") as err:  # as Slurm does by --open-mode=append
            environment = clean | {"SLURM_JOB_ID": "7", "STEP": "0"} | environment
            out = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=err, text=True, env=environment
            )
        out.stderr = (tmp_path / "err").read_text()
        said = [
            (tmp_path / name).read_text().split("\0")[:-1] if (tmp_path / name).exists() else []
            for name in stubs
        ]
        return out, *said

    return run


@pytest.mark.parametrize(
    "code, environment, requeued",
    [
        *((code, {}, None) for code in (0, 2, 3, 126, 127)),
        *((code, {}, "7") for code in (75, 134, 1, 137)),
        (75, {"SLURM_RESTART_COUNT": "99"}, "7"),
        (75, {"SLURM_RESTART_COUNT": "100"}, None),
        (1, {"SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "2"}, None),
        (75, {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, "5_3"),
    ],
)
def test_a_slurm_job_is_requeued_until_it_is_done(slurm, code, environment, requeued):
    """Breaks when a saved or crashed job is not requeued, or one that cannot succeed is.

    Also when one job of an array requeues the whole array, or restarts have no bound.
    """
    out, step, requeue = slurm(
        *COMMAND[1:],
        STEP=str(code),
        SLURM_GPUS_ON_NODE="8",
        SLURM_NTASKS_PER_NODE="8",
        **environment,
    )
    assert out.returncode == code and requeue == (["requeue", requeued] if requeued else [])
    assert step[-len(COMMAND) :] == COMMAND
    assert {"--kill-on-bad-exit=0", "--gpu-bind=none"} <= set(step)
    assert out.stdout == "trained\n" and out.stderr.startswith("before the requeue\n50 %\n")


@pytest.mark.parametrize(
    "said, final", [("task 5: {} 2", 2), ("tasks 0-3,9: {} 3", 3), ("task 0: {} 255", 134)]
)
def test_a_slurm_job_tells_bad_input_from_what_it_broke(slurm, said, final):
    """Breaks when one process's exit code 2 or 3 is hidden by the crashes that follow from it."""
    exited = "Exited with exit code"
    said = (
        f"srun: error: node-7: tasks 1,2: {exited} 1\n"
        f"srun: error: node-8: {said.format(exited)}\n"
        "srun: error: node-7: task 7: Killed\n"
    )
    out, _, requeue = slurm("train", STEP="134", said=said)
    assert out.returncode == final and bool(requeue) == (final == 134) and said in out.stderr


UNABLE = "srun: error: Unable to create step for job 7: "


@pytest.mark.parametrize(
    ("said", "step", "final"),
    [
        (UNABLE + "Invalid generic resource (gres) specification", 1, 2),
        (UNABLE + "More processors requested than permitted", 1, 2),
        (UNABLE + "Memory required by task is not available", 1, 2),
        (
            "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE "
            "are mutually exclusive.",
            1,
            2,
        ),
        ('srun: error: Invalid numeric value "x" for --cpus-per-task.', 255, 2),
        ("srun: unrecognized option '--gpu-bindd=none'", 1, 2),
        (
            "slurmstepd: error: execve(): icae: Permission denied\n"
            "srun: error: n: task 0: Exited with exit code 13",
            13,
            2,
        ),
        (UNABLE + "Requested nodes are busy", 1, 1),
        (UNABLE + "Socket timed out on send/recv operation", 1, 1),
        (UNABLE + "Unable to contact slurm controller (connect failure)", 1, 1),
        (UNABLE + "Job/step already completing or completed", 1, 1),
        (UNABLE + "Slurm backup controller in standby mode", 1, 1),
        (UNABLE + "Protocol authentication error", 1, 1),
        (UNABLE + "Error generating job credential", 1, 1),
        (UNABLE + "Unspecified error", 1, 1),
        ("srun: fatal: Could not establish a configuration source", 1, 1),
        (UNABLE + "Requested node configuration is not available", 1, 2),
        (
            "srun: Job 7 step creation temporarily disabled, retrying (Requested nodes are busy)",
            134,
            134,
        ),
        (
            "srun: error: Node failure on n3\n"
            "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
            137,
            137,
        ),
        ("srun: error: n3: task 3: Segmentation fault", 139, 139),
        (UNABLE + "Invalid generic resource (gres) specification", 0, 0),
    ],
)
def test_a_slurm_job_that_cannot_start_is_not_requeued(slurm, said, step, final):
    """Breaks when a step that Slurm refuses is tried a hundred times.

    Also when one that a busy or lost controller kept from starting is given up.
    """
    out, _, requeue = slurm("train", STEP=str(step), said=said + "\n")
    assert out.returncode == final and bool(requeue) == (final not in (0, 2)) and said in out.stderr
    assert ("nothing was started" in out.stderr) == (final == 2)


def test_a_slurm_array_runs_the_jobs_of_a_sweep(slurm, tmp_path):
    """Breaks when a job runs another's file, or one without a file starts processes."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "point-011.sh").touch()
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "12"}
    for message, environment in (("point-012.sh: no such file", array), ("not an array job", {})):
        out, step, _ = slurm("--jobs", str(tmp_path / "jobs"), **environment)
        assert out.returncode == 2 and message in out.stderr and not step
    out, step, _ = slurm("--jobs", str(tmp_path / "jobs"), **array | {"SLURM_ARRAY_TASK_ID": "11"})
    assert out.returncode == 0 and step[-2:] == ["bash", str(tmp_path / "jobs" / "point-011.sh")]


def test_a_slurm_job_has_a_process_for_each_gpu(slurm):
    """Breaks when a GPU is idle or shared, since JAX gives each process under Slurm one GPU."""
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    lines = dict(re.findall(r"^#SBATCH (--[a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert lines["--ntasks-per-node"] == lines["--gpus-per-node"]
    assert lines["--signal"].startswith("TERM@")
    out, step, _ = slurm("train", SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="8")
    assert out.returncode == 2 and not step
    assert "--gpus-per-node is 4 and --ntasks-per-node 8" in out.stderr


def test_a_dry_run_of_a_slurm_job(slurm):
    """Breaks when the printed commands do not survive a shell, or are run."""
    out, *run = slurm("--dry_run", *COMMAND[1:])
    assert out.returncode == 0 and run == [[], []]
    step, requeue = (
        shlex.split(line)
        for line in out.stdout.splitlines()
        if line.startswith(("srun", "scontrol"))
    )
    assert step[-len(COMMAND) :] == COMMAND and requeue == ["scontrol", "requeue", "7"]
