"""What a contender tells of one step."""

import json
from dataclasses import asdict, dataclass

PHASES = ("sample", "score", "update", "optimizer")


@dataclass(frozen=True)
class Report:
    """One step.

    Attributes:
        step: Seconds of the whole step.
        sample: Seconds of sampling.
        score: Seconds of scoring.
        update: Seconds of log-probabilities and backward pass.
        optimizer: Seconds of the optimiser's step, clipping included.
        lengths: Tokens of each completion.
        prompts: Digest of the prompts' token ids.
        peak_bytes: Largest memory of the process so far.
    """

    step: float
    sample: float
    score: float
    update: float
    optimizer: float
    lengths: list[int]
    prompts: str
    peak_bytes: int

    def dumps(self) -> str:
        """Return the report as a line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, line: str) -> "Report":
        """Return the report of `dumps`."""
        return cls(**json.loads(line))
