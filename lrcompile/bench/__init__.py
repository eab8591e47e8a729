"""The measurements users run on their own machine: `lrcompile bench`."""
