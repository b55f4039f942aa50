from .hooks import Hooks as Hooks

__all__: list[str]
