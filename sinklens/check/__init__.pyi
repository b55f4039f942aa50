from .check import SelfTest as SelfTest

__all__: list[str]
