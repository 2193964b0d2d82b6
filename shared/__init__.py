"""What crosses between processes: schema, stores, catalogue, data sets, models, configuration, errors."""
