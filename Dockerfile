FROM python:3.12-slim
COPY . /diffsal
RUN pip install --no-cache-dir /diffsal
WORKDIR /data
ENTRYPOINT ["diffsal"]
