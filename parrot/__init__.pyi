from parrot.frontend import pfunc as P

__all__ = ["P"]
