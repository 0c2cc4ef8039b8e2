"""Deformable DETR (arXiv 2010.04159) on msda: model, data, training and evaluation."""
