"""The parts of finetune_financial.py: texts (tasks.py), scores (scoring.py), models (methods.py), memory (memory.py), a run."""
