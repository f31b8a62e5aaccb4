"""The version of this package, which runs and evaluations note."""

VERSION = "0.1.0"
