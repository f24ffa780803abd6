"""Two ranks load a model from files by rank: each reads its own bytes and no others, and both compute the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from unimoe import UniMoeForCausalLM
from unimoe.conversion.checkpoints.layouts import plan_layout, run_layout

TEXT = {"num_experts": 4, "num_experts_per_tok": 2}
# Each rank has a copy of the folder without the files of the other's experts, so opening one is an error, and every byte
# that a rank can have read is in a file of its copy.
_LOAD = """
import json, sys
from pathlib import Path
import torch
from transformers.distributed import DistributedConfig
from unimoe.conversion.checkpoints.expert_shards import LazyFile, load_expert_parallel

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
opened = set()
original = LazyFile.slice

def recorded(self, name):
    opened.add(self.path.name)
    return original(self, name)

LazyFile.slice = recorded
folder = Path(sys.argv[1]) / f"rank{rank}"
model = load_expert_parallel(folder, DistributedConfig(tp_size=2, ep_size=2), dtype=torch.float32).eval()
experts = model.model.language_model.layers[0].mlp.experts.gate_up_proj
local = experts.to_local() if hasattr(experts, "to_local") else experts
with torch.no_grad():
    logits = model(torch.arange(5, 25)[None]).logits
if hasattr(logits, "full_tensor"):
    logits = logits.full_tensor()
result = {"opened": sorted(opened), "experts": list(local.shape), "logits": logits[0].tolist()}
(Path(sys.argv[1]) / f"result{rank}.json").write_text(json.dumps(result))
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_each_rank_opens_its_own_experts_only(tmp_path: Path) -> None:
    model = tiny.model(TEXT)
    model.save_pretrained(tmp_path / "fused")
    run_layout(plan_layout(tmp_path / "fused", "per-expert", 2), tmp_path / "ep", progress=False)
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
        for path in (tmp_path / "ep").iterdir():
            if f"rank-{1 - rank:03d}" not in path.name:
                os.link(path, tmp_path / f"rank{rank}" / path.name)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", _LOAD, str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]

    with torch.no_grad():
        expected = model(torch.arange(5, 25)[None]).logits[0]
    whole = sum(path.stat().st_size for path in (tmp_path / "ep").glob("*.safetensors"))
    for rank in range(2):
        result = json.loads((tmp_path / f"result{rank}.json").read_text())
        assert result["experts"] == [2, 96, tiny.HIDDEN]
        own = f"model-experts-rank-{rank:03d}-of-002-00000.safetensors"
        assert result["opened"] == [own, "model-shared-00000.safetensors"]
        read = sum((tmp_path / "ep" / name).stat().st_size for name in result["opened"])
        others = (tmp_path / "ep" / own.replace(f"rank-{rank:03d}", f"rank-{1 - rank:03d}")).stat().st_size
        assert read == whole - others
        torch.testing.assert_close(torch.tensor(result["logits"]), expected, atol=1e-5, rtol=0)


def test_one_process_loads_the_same_folder(tmp_path: Path) -> None:
    model = tiny.model(TEXT)
    model.save_pretrained(tmp_path / "fused")
    run_layout(plan_layout(tmp_path / "fused", "per-expert", 4), tmp_path / "ep", progress=False)
    loaded = UniMoeForCausalLM.from_pretrained(tmp_path / "ep")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
