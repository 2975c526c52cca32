"""The ``grao`` command. What needs no torch is answered before torch is imported."""

import gc
import os
import sys

from grao_lightning import __version__

_HELP = """\
usage: grao <command> [options]

Align a language model with GRAO (arXiv 2508.07750) on PyTorch Lightning.

commands:
  init      write a config, data and a reward to start from:
                                grao init my_project
  fit       train:              grao fit --config configs/quickstart.yaml
  validate  measure RAS, NAG:   grao validate --config ... [--ckpt_path ...]
  compare   several methods side by side, and a report:
                                grao compare --config configs/compare_keywords.yaml
  judge-check
            how far a judge or reward agrees with people:
                                grao judge-check --config configs/judge_check.yaml
  memory    what a run needs on each device, without loading a model:
                                grao memory --config configs/qwen2.5_7b_fsdp2.yaml
  export    write a Hugging Face folder:
                                grao export --ckpt_path ... --output ...

options:
  -h, --help     show this help; `grao <command> --help` shows the command's
  --version      show the version

Every setting of a config can be given on the command line too, for example
  grao fit --config configs/quickstart.yaml --sampling.group_size 16
"""

_USER_ERROR = 2


def main() -> int:
    """Run the command line and return the exit status."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(f"grao-lightning {__version__}")
        return 0
    commands = ("init", "fit", "validate", "compare", "judge-check", "memory", "export")
    if arguments[0] not in commands:
        print(
            f"grao: no command {arguments[0]!r}; there are {', '.join(commands)}", file=sys.stderr
        )
        return _USER_ERROR
    # Tokenizers warn when data workers fork after they have used threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _run(arguments)


def _run(arguments: list[str]) -> int:
    from grao_lightning.callbacks.stopping import Stopped, listening
    from grao_lightning.faults import UserError
    from grao_lightning.rewards.importing import own_modules

    try:
        with listening(), own_modules(arguments[1:]):
            return _carry_out(arguments)
    except UserError as error:
        if os.environ.get("GRAO_TRACEBACK"):
            raise
        print(f"grao: {error}", file=sys.stderr)
        return _USER_ERROR
    except Stopped as stopped:
        print(f"\ngrao: {stopped}{stopped.advice}", file=sys.stderr)
        return stopped.status


def _carry_out(arguments: list[str]) -> int:
    if arguments[0] == "init":
        from grao_lightning.command.init import init_command

        init_command(arguments[1:])
    elif arguments[0] == "export":
        from grao_lightning.command.export import export_command

        export_command(arguments[1:])
    elif arguments[0] == "memory":
        from grao_lightning.command.memory import memory_command

        memory_command(arguments[1:])
    elif arguments[0] == "compare":
        from grao_lightning.compare.command import compare_command

        return compare_command(arguments[1:])
    elif arguments[0] == "judge-check":
        from grao_lightning.judge_check.command import judge_check_command

        return judge_check_command(arguments[1:])
    elif {"-h", "--help"} & set(arguments):
        from grao_lightning.command.help import show_help

        show_help(arguments[0], arguments[1:])
    else:
        gc.disable()  # looking for garbage among what is imported would take a fifth of it
        from grao_lightning.command.fit import run

        gc.freeze()
        gc.enable()
        run(arguments[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
