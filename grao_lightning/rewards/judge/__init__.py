"""The pairwise language-model judge."""

from grao_lightning.rewards.judge.pairwise import PairwiseJudge

__all__ = ["PairwiseJudge"]
