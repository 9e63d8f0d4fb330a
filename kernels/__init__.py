"""The operators that the engine is made of, each in a file that bears its name."""

from kinetiq.kernels.frame_attention import frame_attention, frame_attention_with_motion
from kinetiq.kernels.guided_step import guided_step
from kinetiq.kernels.motion_feature import motion_feature
from kinetiq.kernels.query_attention import query_attention
from kinetiq.kernels.temporal_block import temporal_block

__all__ = [
    "frame_attention",
    "frame_attention_with_motion",
    "guided_step",
    "motion_feature",
    "query_attention",
    "temporal_block",
]
