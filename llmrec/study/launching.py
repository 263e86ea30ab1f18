"""How a training is started: by `accelerate launch`, in one process or in several that are one training."""

import os

from llmrec.stages import stage_path


def launch_options(processes: int) -> list[str]:
    """The options of `accelerate launch` for a training of so many processes on this machine.

    A file of train/accelerate is named each time: by a number of processes alone, accelerate starts a single one
    wherever there are fewer GPUs, and says nothing; and it would go by whatever configuration the user keeps. Each
    process has the threads that torch would take, shared out; accelerate gives one if it is told nothing.
    """
    name = "single" if processes == 1 else "ddp"
    return [
        *("--config_file", str(stage_path(f"train/accelerate/{name}.yaml"))),
        *("--num_processes", str(processes), "--main_process_port", "0"),
        *("--num_cpu_threads_per_process", str(_threads(processes))),
        "--quiet",  # a training's last words are its own
    ]


def _threads(processes: int) -> int:
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    import torch

    return max(1, torch.get_num_threads() // processes)
