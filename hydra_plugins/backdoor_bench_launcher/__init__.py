"""Hydra's plugins of backdoor_bench, found by the name of the folder above: a launcher and a sweeper.

Hydra imports every module here at each start, so nothing heavy is imported before it is used.
"""
