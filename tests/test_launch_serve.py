"""launch/serve: the unit and the deployment fit `icae serve`, systemd and Kubernetes' schemas."""

import importlib.util
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT

from icae_jax.cli import serve
from icae_jax.server import middleware
from icae_jax.server.options import Options

FOLDER = ROOT / "launch" / "serve"
UNIT, MANIFEST = FOLDER / "icae-serve.service", FOLDER / "kubernetes.yaml"
NAME = "icae-serve"


def settings(text):
    """The settings of a unit: all values of each, in their order."""
    found = {}
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r"\w+=", line):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture(scope="module")
def unit():
    return settings(UNIT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def manifest():
    """The objects by kind."""
    return {o["kind"]: o for o in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def pod(manifest):
    return manifest["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    (container,) = pod["containers"]
    return container


def options(arguments):
    """What `icae serve` makes of arguments; a flag that it does not know ends the test."""
    return Options(**vars(serve._parser(Options).parse_args(arguments)) | {"cors": ()})


@pytest.fixture(scope="module")
def both(unit, container):
    """The options of the unit and of the container."""
    (command,) = unit["ExecStart"]
    words = shlex.split(command)
    assert words[0].endswith("/bin/icae") and words[1] == "serve"
    assert container["command"] == ["icae", "serve"]
    return options(words[2:]), options(container["args"])


def test_both_start_the_server_with_flags_that_it_has(both):
    """Breaks when a flag is renamed, or a public address is served without tokens."""
    for made in both:
        assert made.adapter and made.store and made.token_file and made.port
    unit, pod = both
    assert unit.loopback and not pod.loopback


def test_a_grace_period_ends_before_the_manager_kills(both, unit, container, pod):
    """Breaks when what runs is killed while the server lets it end."""
    ours, theirs = both
    more = 5  # for closing the store and the devices
    assert float(unit["TimeoutStopSec"][0]) >= ours.grace + more
    waits = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= waits + theirs.grace + more
    assert unit["KillSignal"] == ["SIGTERM"] and unit["KillMode"] == ["mixed"]


def test_exit_codes_say_what_starts_again(unit):
    """Breaks when a wrong flag is tried for ever, or a fault is not tried again."""
    assert unit["Restart"] == ["on-failure"] and unit["RestartPreventExitStatus"] == ["2"]


def test_ports_and_names_agree(both, manifest, container, pod):
    """Breaks when a Service, a probe or a selector leads nowhere."""
    (port,) = container["ports"]
    assert port["containerPort"] == both[1].port
    (served,) = manifest["Service"]["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifest["Service"]["spec"]["selector"].items() <= labels.items()
    assert manifest["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == port["name"]
        assert asked["path"] in middleware.OPEN_PATHS  # a probe has no token
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if len(v) == 2
              and "persistentVolumeClaim" in v]  # fmt: skip
    assert claims == [manifest["PersistentVolumeClaim"]["metadata"]["name"]]


def test_what_is_written_is_writable_and_nothing_else(both, unit, container, pod):
    """Breaks when a cache or the store lies on a read-only system, or tokens in a volume."""
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    assert {m["name"] for m in mounts.values()} == {v["name"] for v in pod["volumes"]}
    environment = {e["name"]: e["value"] for e in container["env"]}
    for path in (both[1].store, environment["ICAE_CACHE"], environment["HF_HOME"], "/tmp"):
        (mount,) = [m for at, m in mounts.items() if path == at or path.startswith(f"{at}/")]
        assert not mount.get("readOnly")
    secret = both[1].token_file.rpartition("/")[0]
    assert mounts[secret]["readOnly"]
    (volume,) = [v for v in pod["volumes"] if v["name"] == mounts[secret]["name"]]
    assert volume["secret"]["items"][0]["path"] == both[1].token_file.rpartition("/")[2]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert pod["securityContext"]["runAsNonRoot"]

    state, caches = unit["StateDirectory"][0], unit["CacheDirectory"][0]
    assert both[0].store.startswith(f"/var/lib/{state}/")
    (environment,) = unit["Environment"]
    values = dict(word.split("=", 1) for word in environment.split())
    assert all(values[name].startswith(f"%C/{caches}") for name in ("HOME", "ICAE_CACHE"))
    assert both[0].token_file == "${CREDENTIALS_DIRECTORY}/tokens"
    assert unit["LoadCredential"][0].startswith("tokens:/etc/")
    for name in ("NoNewPrivileges", "DynamicUser", "PrivateTmp", "ProtectHome"):
        assert unit[name] == ["yes"]
    assert unit["ProtectSystem"] == ["strict"]
    assert "MemoryDenyWriteExecute" not in unit  # compiled programs are written, then run


def test_one_process_writes_the_store(manifest):
    """Breaks when a new pod starts while the old one holds the store's lock."""
    spec = manifest["Deployment"]["spec"]
    assert spec["replicas"] == 1 and spec["strategy"] == {"type": "Recreate"}
    assert manifest["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_manifest_holds_to_the_published_schemas(manifest):
    """Breaks when a field has another name, place or type than Kubernetes knows."""
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate, which carries the schemas, is not installed")
    import kubernetes_validate

    for thing in manifest.values():
        kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)
    wrong = {**manifest["Service"], "spec": {"port": 80}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path):
    """Breaks when a setting is misspelt, or unknown to systemd."""

    def verify(text):
        path = tmp_path / UNIT.name
        path.write_text(text, encoding="utf-8")
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True
        )
        return done.returncode, done.stderr

    text = UNIT.read_text(encoding="utf-8")
    assert text.count("/opt/icae/bin/icae") == 1
    text = text.replace("/opt/icae/bin/icae", shutil.which("true"))
    code, said = verify(text)
    assert code == 0 and NAME not in said, said
    _, said = verify(text.replace("NoNewPrivileges", "NoNewPrivilege"))
    assert "NoNewPrivilege" in said
