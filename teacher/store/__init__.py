"""Where off-policy targets are kept; `python -m teacher.store show|stats|verify|merge DIR` looks into one."""

from teacher.store.target_store import TargetStore, TargetStoreWriter

__all__ = ["TargetStore", "TargetStoreWriter"]
