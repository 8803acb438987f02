"""Build what no wheel gives: Horovod for this torch, and DeepSpeed's compiled operators."""
