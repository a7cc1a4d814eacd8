"Everything that is promised to work without a network does, and says so where it cannot."
from __future__ import annotations

import os
import subprocess
import sys
import textwrap

CUT = """
import socket
calls = []
def refuse(*args, **kw):
    calls.append(args[1:] or args)
    raise OSError("the network is off")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = refuse
"""


def run(code: str, tmp_path, **env: str) -> str:
    "Run `code` in a fresh interpreter whose sockets refuse to connect; return what it printed."
    base = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    own = {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command, full = [sys.executable, "-c", CUT + textwrap.dedent(code)], {**base, **own, **env}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=full, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_pocket_world_needs_no_network(tmp_path):
    "And does not even try to use it."
    out = run("""
        from subnet_explorer import Cloze, Mask, Space, Threshold, find, load, masked, read_facts, split
        for name in ("pocket-bert", "pocket-gpt2"):
            model, tok = load(name)
            data = split(read_facts("pocket", "MadeOf"))
            gate = Threshold(Space.of(model, "head+mlp"))
            run = find(model, tok, gate, Cloze(data.train), steps=3, every=1, to=name, progress=False)
            assert run.done and len(run.metrics) == 3
            with masked(model, Mask.load(f"{name}/mask.safetensors")):
                model(**tok("a cup is made of glass .", return_tensors="pt"))
        assert not calls, calls
        print("fine")
    """, tmp_path)
    assert out.split()[-1] == "fine"


def test_unreachable_names_are_unknown_models(tmp_path):
    out = run("""
        from subnet_explorer.model.load import UnknownModel, load
        for name in ("bert-base-uncased", "no/such/model", "./nowhere"):
            try: load(name)
            except UnknownModel as e: assert repr(name) in str(e) and "pocket-bert" in str(e), e
            else: raise AssertionError(name)
        print("fine")
    """, tmp_path, HF_HUB_OFFLINE="1")
    assert out.split()[-1] == "fine"
