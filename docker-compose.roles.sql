-- Run once, on an empty volume: a database and an owner each for Optuna and MLflow, and who may only read.
\getenv password POSTGRES_PASSWORD
CREATE ROLE sieve LOGIN PASSWORD :'password';
CREATE ROLE mlflow LOGIN PASSWORD :'password';
CREATE ROLE viewer LOGIN PASSWORD :'password';
CREATE DATABASE sieve OWNER sieve ENCODING 'UTF8' TEMPLATE template0;
CREATE DATABASE mlflow OWNER mlflow ENCODING 'UTF8' TEMPLATE template0;
REVOKE CONNECT ON DATABASE sieve, mlflow FROM PUBLIC;
GRANT CONNECT ON DATABASE sieve TO sieve, viewer;
GRANT CONNECT ON DATABASE mlflow TO mlflow;
\connect sieve
ALTER DEFAULT PRIVILEGES FOR ROLE sieve IN SCHEMA public GRANT SELECT ON TABLES TO viewer;
