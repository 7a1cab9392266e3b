"""What crosses a process boundary, as msgspec Structs, and nothing else: the public API, the engine API, the errors."""
