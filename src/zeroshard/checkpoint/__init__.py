"""Checkpoints of training, which fit any stage and any number of ranks."""

from zeroshard.checkpoint.signposts import get_model_state_file, get_optim_files

__all__ = ["get_model_state_file", "get_optim_files"]
