"""Activation checkpointing with DeepSpeed's calls: ``configure``, ``checkpoint``, RNG tracker."""
