"""The proxy: forwards every byte unchanged and tells the daemon who asked for what, and when."""
