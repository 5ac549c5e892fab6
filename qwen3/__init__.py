"""The Qwen3 family: configuration, decoder, checkpoints, chat format, sampling. Teacher and student both live here."""
