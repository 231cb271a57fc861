"""Crosslevel: visual features from natural, unlabelled images."""
