"""Where off-policy targets are kept; `python -m teacher.store show|stats|verify|merge DIR` looks into one."""

from teacher.store.target_store import INDEX_NAME, TargetStore, TargetStoreWriter

__all__ = ["INDEX_NAME", "TargetStore", "TargetStoreWriter"]
