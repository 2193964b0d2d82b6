"""Processes beside the training: the controller and the REST service."""
