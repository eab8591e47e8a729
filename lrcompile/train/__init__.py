"""The training driver: `lrcompile pretrain` and `lrcompile finetune`, thin over torch.distributed and the public API."""
