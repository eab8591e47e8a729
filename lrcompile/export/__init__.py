"""A model on its way out: a file that a phone runs (ExecuTorch), or a dense model directory (transformers).

unfold.py    adopted modules as plain linears: a pair becomes two thin ones
cached.py    the model with its keys and values in buffers: one call a prompt, one call a token
quantise.py  the linears and embeddings in 8da4w or int8, through torchao
rewrite.py   the traced program in operators that XNNPACK takes whole
budget.py    what the file will weigh, and what would fit
lower.py     torch.export, XNNPACK, the file
tie.py       a head tied to the embedding is in the file once
runtime.py   ExecuTorch's CPU runtime: loads the file, generates greedily
score.py     a file, or its eager model, for lm-eval
dense.py     the merged model, for transformers
command.py   `lrcompile export` and `lrcompile generate`
"""
