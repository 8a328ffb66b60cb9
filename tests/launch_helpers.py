"""A command to launch, and programs that stand in for those of a cloud or a cluster."""

import os

COMMAND = ["icae", "train", "--workdir", "/mnt/runs/a b", '--config.note=it\'s "$HOME" & *']


def write_stubs(folder, stubs):
    folder.mkdir(parents=True)
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
