"""Configurations that would run code of somebody else's, each with a file that is there afterwards if they did."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sign),)


def pickled(file: Path, sign: Path) -> Path:
    """A file that makes `sign` when it is unpickled."""
    file.write_bytes(pickle.dumps(Canary(sign), protocol=2))  # torch.load warns of others
    return file


def evil_configurations(evil: Path, sign: Path) -> dict[str, dict[str, Any]]:
    """By name: values to put at dotted keys of a run's configuration."""
    unpickle = {"_target_": "torch.load", "f": str(evil), "weights_only": False}
    makes = {"_args_": [str(sign)]}
    mkdir = {"_target_": "os.mkdir", **makes}
    text = f"{{_target_: os.mkdir, _args_: ['{sign}']}}"
    return {
        "instead of the protocol": {"protocol": unpickle},
        "instead of the network": {"model": unpickle},
        "instead of the allocation": {"allocation": unpickle},
        "as an argument": {"weight.range": unpickle},
        "as a correction": {"corrections": {"mine": unpickle}},
        "in the optimizer of a correction": {
            "corrections": {"mine": {"_target_": "lightning_modules.tuning.TuningModule", "optimizer": unpickle}}
        },
        "in a list": {"weight._args_": [[1, {"deep": [mkdir]}]]},
        "os": {"protocol": mkdir},
        "posix": {"protocol": {"_target_": "posix.mkdir", **makes}},
        "builtins": {"protocol": {"_target_": "builtins.eval", "_args_": [f"__import__('os').mkdir({str(sign)!r})"]}},
        "upper case": {"protocol": {"_target_": "OS.mkdir", **makes}},
        "a blank before it": {"protocol": {"_target_": " os.mkdir", **makes}},
        "as a relative name": {"protocol": {"_target_": "..os.mkdir", **makes}},
        "by Hydra": {"protocol": {"_target_": "hydra.utils.instantiate", "config": mkdir}},
        "by Hydra's older name": {"protocol": {"_target_": "hydra.utils.call", "config": mkdir}},
        "a method by its name": {"protocol": {"_target_": "hydra.utils.get_method", "path": "os.mkdir"}},
        "by functools": {"protocol": {"_target_": "functools.partial", "_args_": [{**mkdir, "_partial_": True}]}},
        "what one of our modules imports": {"protocol": unpickle | {"_target_": "networks.architectures.torch.load"}},
        "a function that one of our modules imports": {
            "weight": {"_target_": "lightning_modules.saved_students.instantiate", "config": mkdir}
        },
        "a module in one of ours": {
            "weight": {"_target_": "callbacks.run_record.subprocess.run", "args": ["mkdir", str(sign)]}
        },
        "an alias in one of our packages": {"weight": {"_target_": "quantizers.report.os.mkdir", **makes}},
        "by an interpolation": {"name": "os.mkdir", "protocol": {"_target_": "${name}", **makes}},
        "by a variable of the environment": {"protocol": {"_target_": "${oc.env:CANARY}", **makes}},
        "by its default": {"protocol": {"_target_": "${oc.env:NOT_SET,os.mkdir}", **makes}},
        "decoded from text": {"name": text, "protocol": "${oc.decode:${name}}"},
        "created from text": {"name": text, "protocol": "${oc.create:${name}}"},
        "in another group": {"mine": mkdir, "protocol": "${mine}"},
        "a resolver that was registered": {"seed": f"${{canary:{sign}}}"},
        "the same behind its name": {"name": "canary", "seed": f"${{${{name}}:{sign}}}"},
        "an interpolation in two pieces": {
            "name": "$",
            "tags": [f"{{canary:{sign}}}"],
            "protocol.name": "${name}${tags[0]}",
        },
        "an interpolation that is escaped": {"protocol.name": f"\\${{canary:{sign}}}"},
        "as no text at all": {"protocol._target_": ["os.mkdir"]},
        "file of the network's library": {"model.options": {"checkpoint_path": str(evil)}},
    }
