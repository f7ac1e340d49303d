"""The settings of a training run, their checks, and the recipes that give their values for each stage."""

from train.config.loss import AlignConfig, LossConfig
from train.config.measure import MeasureConfig
from train.config.train import CACHED_STAGES, Stage, StudentConfig, TrainConfig

__all__ = ["CACHED_STAGES", "AlignConfig", "LossConfig", "MeasureConfig", "Stage", "StudentConfig", "TrainConfig"]
