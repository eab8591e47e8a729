def covariances(model, batches):
    raise NotImplementedError
