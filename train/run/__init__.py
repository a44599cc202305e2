"""Runs a script: its options, devices, folder, log and report."""
