"""The commands of `qzo`, one file each."""
