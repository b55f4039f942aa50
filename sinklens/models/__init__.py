"""Loading models: the embedded catalogue, local folders and the hub, and what each was proven to do."""
