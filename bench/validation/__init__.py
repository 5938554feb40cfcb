"""Predicted memory beside measured memory."""
