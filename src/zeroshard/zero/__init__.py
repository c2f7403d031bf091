"""What scripts written for DeepSpeed call as ``deepspeed.zero`` and ``deepspeed.utils``.

Models built in shards, full parameters outside of forward, and the state of single parameters.
"""
